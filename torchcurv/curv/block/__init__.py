"""One block of the curvature."""
