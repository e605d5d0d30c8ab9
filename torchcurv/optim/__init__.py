"""Update rules on top of the curvature."""
