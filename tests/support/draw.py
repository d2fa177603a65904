"""Random tensors."""

import torch


def draw(*shape, dtype=torch.float64, scale=1.0, grad=False, seed=None):
    """Normal numbers, drawn in fp64, so that every dtype sees the same ones; of the test's seed, or
    of one of their own."""
    rng = None if seed is None else torch.Generator().manual_seed(seed)
    t = scale * torch.randn(shape, dtype=torch.float64, generator=rng)
    return t.to(dtype).requires_grad_(grad)
