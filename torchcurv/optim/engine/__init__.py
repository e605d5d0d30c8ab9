"""What every optimizer shares: blocks made of parameter groups, when they are refreshed, how they are kept."""
