"""Training with the compiled CPU kernels: hand-written gradients, no gradient matrices."""
