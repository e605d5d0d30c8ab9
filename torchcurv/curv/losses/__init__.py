"""Losses as formulas: values, gradients, roots of Hessians, samplers."""
