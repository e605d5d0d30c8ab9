"""Which signals are backpropagated from the output."""
