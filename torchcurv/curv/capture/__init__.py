"""Hooks: what a forward pass does with the layers, and the curvature passes that a loss starts."""
