"""Which statistic of (a, s) is kept, and how it is factored."""
