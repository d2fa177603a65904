"""The layout of the flat vector."""

from itertools import pairwise

import pytest
import torch

from hyperfast import MLPSpec
from hyperfast.layout import ParamSpec

SIZES = [(1, 1), (4, 3), (4, 8, 3), (2, 5, 1, 7, 3)]


@pytest.fixture(params=SIZES, ids=str)
def sizes(request):
    return request.param


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def spec(sizes, request):
    return MLPSpec(sizes, request.param)


def test_counts(spec, sizes):
    layers = [torch.nn.Linear(i, o, spec.bias) for i, o in pairwise(sizes)]
    parameters = [p for layer in layers for p in layer.parameters()]
    assert spec.numel == sum(p.numel() for p in parameters)
    assert spec.shapes == tuple(tuple(p.shape) for p in parameters)
    assert spec.numels == tuple(p.numel() for p in parameters)
    assert [layer.numel for layer in spec.layers] == [
        sum(p.numel() for p in layer.parameters()) for layer in layers
    ]
    assert [layer.weight_numel for layer in spec.layers] == [w.weight.numel() for w in layers]


def test_weight_row_major_then_bias(spec):
    flat = torch.arange(spec.numel)
    start = 0
    for piece, shape in zip(spec.split(flat), spec.shapes, strict=True):
        assert torch.equal(piece, torch.arange(start, start + piece.numel()).view(shape))
        start += piece.numel()


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)], ids=str)
def test_split_gives_views_and_flatten_inverts(spec, batch):
    flat = torch.randn(*batch, spec.numel)
    pieces = spec.split(flat)
    assert all(p.shape == batch + s for p, s in zip(pieces, spec.shapes, strict=True))
    assert all(p._base is flat for p in pieces)
    assert torch.equal(spec.flatten(pieces), flat)


def test_scalar_parameters():
    spec = ParamSpec(((2, 3), (), (4,)))
    flat = torch.randn(5, 11)
    pieces = spec.split(flat)
    assert [p.shape for p in pieces] == [(5, 2, 3), (5,), (5, 4)]
    assert torch.equal(pieces[1], flat[:, 6])
    assert torch.equal(spec.flatten(pieces), flat)


def test_split_of_strided_flat():
    spec = MLPSpec((2, 3, 1))
    flat = torch.randn(spec.numel, 4).mT
    assert torch.equal(spec.flatten(spec.split(flat)), flat)


def test_equality_hash_repr():
    assert MLPSpec((2, 3)) == MLPSpec([2, 3])
    assert MLPSpec((2, 3)) != MLPSpec((2, 3), bias=False)
    assert MLPSpec((2, 3)) != MLPSpec((3, 2))
    assert len({MLPSpec((2, 3)), MLPSpec((2, 3))}) == 1
    assert eval(repr(MLPSpec((2, 3), False))) == MLPSpec((2, 3), False)
