"""Gaussians over parameters whose precision is a curvature."""
