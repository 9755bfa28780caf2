"""Training with the Triton kernels: hand-written gradients, no [batch, d_sae] matrix and no gradient matrices."""
