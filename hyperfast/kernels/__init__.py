"""What an op means, the plans in plain PyTorch, and the Triton kernels."""
