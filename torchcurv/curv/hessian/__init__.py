"""Second derivatives: products by autograd, and propagation through the functions of a forward pass."""
