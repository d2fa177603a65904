"""Value and every gradient of every op, in every variant, against the specification in fp64."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from hyperfast.kernels import eager
from tests.support.cases import (
    Sizes,
    close,
    every_size,
    every_variant,
    floats,
    unplanned,
    value_and_gradients,
)

SMALL = Sizes(3, 2, 2, 3, 2)


@every_size
@every_variant
def test_value_and_gradients(variant, sizes):
    args, expected = value_and_gradients(variant, sizes)
    with torch.no_grad():
        close(variant.eager(*args), expected)


@every_variant
def test_many_small_blocks(variant, monkeypatch):
    monkeypatch.setattr(eager, "BLOCK", 40)
    args = variant.random(Sizes(7, 5, 3, 4, 6))
    close(variant.eager(*args), variant.expected(*args))


@every_variant
def test_gradcheck(variant):
    args = variant.random(SMALL, grad=True)
    assert gradcheck(variant.op, args)


@every_variant
def test_gradgradcheck(variant):
    args = variant.random(SMALL, grad=True)
    assert gradgradcheck(variant.op, args, fast_mode=True)


@pytest.mark.parametrize("grad", [False, True], ids=["plain", "grad"])
@unplanned
def test_opcheck(variant, grad, dynamo):
    torch.library.opcheck(variant.op, variant.random(SMALL, grad=grad))


@every_variant
def test_third_derivative(variant):
    args = variant.random(SMALL, grad=True)

    def third(f):
        y = f(*args).sin().sum()
        for _ in range(3):
            y = sum(g.sin().sum() for g in torch.autograd.grad(y, floats(args), create_graph=True))
        return y

    close(third(variant.op), third(variant.expected))
