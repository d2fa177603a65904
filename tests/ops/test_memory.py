"""Strides, memory that is never written, repeatability."""

import pytest
import torch

from tests.support.budget import close
from tests.support.cases import Sizes, every_variant, floats

SIZES = Sizes(3, 5, 4, 6, 7)


def transposed(t):
    return t.mT.contiguous().mT if t.ndim > 1 else gaps(t)


def gaps(t):
    """Strides beyond the sizes, NaN in between."""
    return torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]


def backwards(t):
    """Storage in reverse order of the dimensions."""
    dims = tuple(reversed(range(t.ndim)))
    return t.permute(dims).contiguous().permute(dims)


def expanded(t):
    """All strides zero."""
    return t.flatten()[0].expand_as(t)


def expanded_rows(t):
    return t[:1].expand_as(t)


@pytest.mark.parametrize("how", [transposed, gaps, backwards, expanded, expanded_rows])
@every_variant
def test_strides(variant, how):
    args = [how(a) if floats([a]) else a for a in variant.random(SIZES)]
    plain = [a.contiguous() if isinstance(a, torch.Tensor) else a for a in args]
    for kernel in variant.kernels:
        close(kernel(*args), variant.expected(*plain))


@every_variant
def test_strided_ids(variant):
    args = variant.random(SIZES)
    apart = [
        torch.stack([a, torch.full_like(a, -7)], -1)[..., 0]
        if isinstance(a, torch.Tensor) and a.dtype == torch.int64
        else a
        for a in args
    ]
    for kernel in variant.kernels:
        close(kernel(*apart), variant.expected(*args))


@every_variant
def test_expanded_gradient(variant):
    """The gradient of ``sum`` is one number with stride 0."""
    args = variant.random(SIZES, grad=True)
    actual = torch.autograd.grad(variant.op(*args).sum(), floats(args))
    close(actual, torch.autograd.grad(variant.expected(*args).sum(), floats(args)))


@pytest.mark.parametrize("sizes", [SIZES, Sizes(rows=0), Sizes(63, 1, 3, 3, 1)])
@every_variant
def test_every_element_is_written(variant, sizes, nan_poison):
    args = variant.random(sizes, grad=True)
    y, expected = variant.op(*args), variant.expected(*args)
    close(y, expected)
    close(
        torch.autograd.grad(y.sum(), floats(args)),
        torch.autograd.grad(expected.sum(), floats(args)),
    )
    with torch.no_grad():
        close(variant.eager(*args), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_variant
def test_the_same_bits_again(variant, dtype):
    args = variant.random(Sizes(5, 40, 17, 9, 33), dtype=dtype)
    for kernel in variant.kernels:
        assert torch.equal(kernel(*args), kernel(*args))


@every_variant
def test_arguments_are_left_alone(variant):
    args = variant.random(SIZES)
    before = [a.clone() for a in floats(args)]
    for kernel in variant.kernels:
        kernel(*args)
    assert all(torch.equal(a, b) for a, b in zip(floats(args), before, strict=True))
