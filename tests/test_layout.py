"""The layout of the flat vector, and the text of a network."""

from itertools import pairwise
from random import Random

import pytest
import torch
from torch import nn

from hyperfast import MLPSpec, Sine
from hyperfast.activations import KNOWN
from hyperfast.layout import TRANSFORMS, Layer, Network, ParamSpec
from hyperfast.plans.cpu import EXTENSION

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


def random_network(generator):
    """A network of any activations, biases and transforms, as its layers."""
    layers, width, begin = [], generator.randint(1, 99), 0
    for _ in range(generator.randint(1, 4)):
        name = generator.choice(list(KNOWN))
        number = generator.uniform(-3, 30) if KNOWN[name].parameter else KNOWN[name].default
        transform = generator.choice(["", *TRANSFORMS])
        out, bias = generator.randint(1, 99), generator.choice(["", "b", "s"])
        layers.append(Layer(width, out, bias, name, number, transform, begin))
        begin, width = layers[-1].end, out
    return Network(tuple(layers))


def test_a_network_is_its_text():
    generator = Random(0)
    for _ in range(300):
        network = random_network(generator)
        assert Network.parse(network.text) == network
        assert Network.parse(network.text).text == network.text
        if EXTENSION is not None:  # whose parser takes it as well
            EXTENSION.runs_whole(network.text, "float32", False, 1, 1, 1)


def test_the_text_of_a_network():
    activations = [nn.ReLU(), Sine(30), None]
    assert MLPSpec((64, 64, 32, 10)).describe(activations) == "64 > 64 b relu, 32 b sin:30.0, 10 b"
    assert MLPSpec((3, 5, 2), False).describe([nn.LeakyReLU(0.3), nn.Identity()]) == (
        "3 > 5 leaky_relu:0.3, 2"
    )
    assert Network.parse("3 > 5 leaky_relu, 2 sin").text == "3 > 5 leaky_relu:0.01, 2 sin:1.0"
    layer = Network.parse("8 > 32 s elu abs(W), 1 b").layers[0]
    assert (layer.bias, layer.activation, layer.transform) == ("s", "elu", "abs")


@pytest.mark.parametrize(
    "text",
    [
        *("", "3", "3 >", "3 > ", "3 > 0", "0 > 3", "3 > 4  b", "3 > 4 b,2", "3 > 4 b relu,  2"),
        *("3>4", "3 > 4 B", "3 > 4 relu b", "3 > 4 b nope", "3 > 4 b sin:", "3 > 4 b sin:x"),
        *("3 > 4 b\n", "3 > 4 b cube(W)", "3 > 4 b abs(W) relu", "03 > 4", "3 > 4 b s"),
        *("3 > -4", "3 > 4.0", "3 > 4 relu:3.0", "3 > 4 sin:30", "3 > 4 sin:inf", "3 > 4 sin:nan"),
        *("3 > 4 sin:1e400", "3 > 4 sin:1_0.0", "3 > 4 sin:+1.0", "3 > 4 b identity"),
        *("3 > 1234567890123456789", "3 > 4 sin:.", "3 > 4 sin:30e", "3 > 4 tanh:"),
    ],
)
def test_what_is_no_network(text):
    with pytest.raises(ValueError, match="network"):
        Network.parse(text)
    if EXTENSION is not None:
        with pytest.raises(ValueError, match="network"):
            EXTENSION.runs_whole(text, "float32", False, 1, 1, 1)


def test_modules_of_a_network_describe_it():
    text = "3 > 4 b sin:2.5, 4 b leaky_relu:0.3, 2 b gelu_tanh, 2 b"
    network = Network.parse(text)
    assert network.spec.describe(network.modules()) == text


@pytest.mark.parametrize(
    "text", ["3 > 4 b relu, 2", "3 > 4 relu, 2 b", "3 > 4 b abs(W), 2 b abs(W)"]
)
def test_a_spec_describes_mixed_biases_and_one_transform(text):
    network = Network.for_kernels(text)
    assert network.numel == network.weight_numel + sum(
        layer.out_features for layer in network.layers if layer.bias
    )
    assert network.spec.describe(network.modules(), network.transform) == text
    assert network.spec.numel == network.numel


def test_what_no_spec_describes():
    with pytest.raises(ValueError, match="no shared biases"):
        _ = Network.parse("3 > 4 s, 2").spec
    with pytest.raises(ValueError, match="one transform"):
        _ = Network.parse("3 > 4 abs(W), 2").transform


def test_kernels_know_no_shared_biases():
    with pytest.raises(ValueError, match="no shared biases"):
        Network.for_kernels("3 > 4 s relu, 2 b")


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("bias", ["", " b"])
def test_places_of_stored_networks(bias, scaled):
    network = Network.parse(f"3 > 4{bias} relu, 2 b")
    spans = []
    for place, layer in zip(network.places(scaled), network.layers, strict=True):
        m, o = layer.weight_numel, layer.out_features
        spans.append(("weights", place.matrix, place.matrix + m))
        vectors = "scales" if scaled else "weights"
        spans += [(vectors, place.scale, place.scale + o)] * scaled
        spans += [(vectors, place.bias, place.bias + o)] * (layer.bias == "b")
    for row in ("weights", "scales"):
        edges = [0]
        for _, begin, end in sorted(span for span in spans if span[0] == row):
            assert begin == edges[-1]
            edges.append(end)
        if row == "weights":
            assert edges[-1] == (network.numel if not scaled else 3 * 4 + 4 * 2)
        elif scaled:
            assert edges[-1] == network.vector_numel == 6 + 2 + 2 * len(bias)
