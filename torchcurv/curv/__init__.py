"""Curvature of the loss, layer by layer."""
