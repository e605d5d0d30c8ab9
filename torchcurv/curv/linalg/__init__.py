"""Linear algebra of symmetric matrices."""
