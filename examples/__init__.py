"""Complete short programs; each has a `main` that returns its figure, and `python -m examples.NAME` writes it."""
