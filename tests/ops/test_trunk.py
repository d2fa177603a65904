"""Trunk and networks as one op: values, every gradient, derivatives beyond, and what is refused."""

from itertools import product

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from hyperfast.activations import KNOWN
from hyperfast.layout import Network
from hyperfast.ops import trunk as ops
from hyperfast.plans.cpu import EXTENSION, EXTENSION_ERROR
from tests.support.budget import assert_as_good, close
from tests.support.draw import draw
from tests.support.networks import expected, random, text

if EXTENSION is None:
    pytest.skip(EXTENSION_ERROR, allow_module_level=True)

# sizes of the trunk and of the network, tasks, rows a task
SIZES = [
    ((5, 4), (3, 6, 2), 3, 5),
    ((1, 1), (1, 1), 1, 1),
    ((63, 3, 63), (63, 3, 1), 63, 1),
    ((32, 64), (64, 10), 1, 1),
    ((7, 33, 9, 16), (2, 32, 1), 300, 3),
    ((9, 20), (2, 32, 1), 300, 1),
    ((5, 4), (3, 2), 0, 2),
    ((5, 4), (3, 2), 3, 0),
]


def trunk_of(layers, grad=True, dtype=torch.float64):
    """Matrices and biases of a trunk."""
    tensors = []
    for layer in Network.parse(layers).layers:
        scale = layer.in_features**-0.5
        tensors.append(draw(layer.out_features, layer.in_features, scale=scale, dtype=dtype))
        if layer.bias:
            tensors.append(draw(layer.out_features, scale=0.5, dtype=dtype))
    return [t.requires_grad_(grad) for t in tensors]


def given(trunk, sizes, tasks, rows, *, ragged=False, bias=True):
    """x, z, head and ids."""
    x, _, weight, shift, ids = random(sizes, tasks, rows, trunk[-1], ragged=ragged, bias=bias)
    return x, draw(tasks, trunk[0], grad=True), weight, shift, ids


def specification(x, z, trunk, weight, bias, ids, layers, network):
    """Layer by layer, differentiated by PyTorch."""
    h = ops.features(z, trunk, layers)
    return expected(x, h, weight, bias, ids, network)


@pytest.mark.parametrize("ragged", [False, True], ids=["batched", "ragged"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("activation", [*KNOWN, "leaky_relu:0.2", "sin:3.0"])
def test_value_and_gradients(activation, size, ragged):
    sizes, net_sizes, tasks, rows = size
    for last, has_bias in product((activation, "identity"), (False, True)):
        layers = text(sizes, [activation] * (len(sizes) - 2) + [last], has_bias)
        network = text(net_sizes, "tanh")
        x, z, weight, bias, ids = given(sizes, net_sizes, tasks, rows, ragged=ragged, bias=has_bias)
        trunk = trunk_of(layers)
        want = specification(x, z, trunk, weight, bias, ids, layers, network)
        y = ops.run(x, z, trunk, weight, bias, ids, layers, network)
        close(y, want)
        leaves = [t for t in (x, z, weight, bias, *trunk) if t is not None]
        grad = torch.randn_like(y)
        close(torch.autograd.grad(y, leaves, grad), torch.autograd.grad(want, leaves, grad))
        with torch.no_grad():
            close(ops.run(x, z, trunk, weight, bias, ids, layers, network), want)


@pytest.mark.parametrize("mask", list(product((False, True), repeat=5)))
def test_only_the_gradients_asked_for(mask):
    layers, network = text((5, 6, 4), "tanh,relu"), text((3, 6, 2), "tanh")
    x, z, weight, bias, ids = given((5, 4), (3, 6, 2), 7, 5)
    trunk = trunk_of(layers)
    with torch.no_grad():
        args = x, z, trunk, weight, bias, ids
        y, *kept = ops.trunk_mlp(*args, layers, network, True)
        full = ops.trunk_mlp_backward(y, *args, *kept, layers, network, [True] * 5)
        some = ops.trunk_mlp_backward(y, *args, *kept, layers, network, mask)
    of_x, of_z, of_trunk, of_weight, of_bias = mask
    wanted = [of_x, of_z, of_weight, of_bias, *[of_trunk] * len(trunk)]
    for want, one, other in zip(wanted, some, full, strict=True):
        close(one, other) if want else close(one.numel(), 0)
    for t, want in zip((x, z, weight, bias), wanted, strict=False):
        t.requires_grad_(want)
    for t in trunk:
        t.requires_grad_(of_trunk)
    if any(mask):
        leaves = [t for t in (x, z, weight, bias, *trunk) if t.requires_grad]
        found = torch.autograd.grad(ops.run(*args, layers, network), leaves, y)
        close(found, [t for t, want in zip(full, wanted, strict=True) if want])


@pytest.mark.parametrize("ragged", [False, True], ids=["batched", "ragged"])
def test_derivatives_of_derivatives(ragged):
    layers, network = text((3, 4, 2), "sin:2.0,tanh"), text((3, 4, 2), "elu")
    x, z, weight, bias, ids = given((3, 2), (3, 4, 2), 3, 2, ragged=ragged)
    trunk = trunk_of(layers)

    def f(x, z, weight, bias, *trunk):
        return ops.run(x, z, trunk, weight, bias, ids, layers, network)

    args = x, z, weight, bias, *trunk
    assert gradcheck(f, args)
    assert gradgradcheck(f, args)


def test_batched_gradients():
    layers, network = "3 > 4 b tanh", text((3, 4, 2), "tanh")
    x, z, weight, bias, ids = given((3, 4), (3, 4, 2), 3, 2)
    trunk = trunk_of(layers)
    y = ops.run(x, z, trunk, weight, bias, ids, layers, network)
    grads = torch.randn(5, *y.shape, dtype=torch.float64)
    leaves = z, weight, *trunk
    found = torch.autograd.grad(y, leaves, grads, is_grads_batched=True, retain_graph=True)
    for n, grad in enumerate(grads):
        close([t[n] for t in found], torch.autograd.grad(y, leaves, grad, retain_graph=True))
    mapped = torch.vmap(lambda grad: torch.autograd.grad(y, leaves, grad, retain_graph=True))
    close(mapped(grads), found)


def test_tensors_of_any_strides():
    layers, network = text((5, 6, 4), "silu,tanh"), text((3, 6, 2), "tanh")
    x, z, weight, bias, ids = given((5, 4), (3, 6, 2), 300, 2)
    trunk = [t.mT.contiguous().mT if t.ndim == 2 else t for t in trunk_of(layers)]
    for latents in (z.mT.contiguous().mT, z[:1].expand(300, -1), z[:, :1].expand(-1, 5)):
        latents = latents.detach().requires_grad_()
        args = x, latents, trunk, weight, bias, ids
        y, want = ops.run(*args, layers, network), specification(*args, layers, network)
        close(y, want)
        leaves = x, latents, weight, bias, *trunk
        close(torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(want.sum(), leaves))


@pytest.mark.parametrize("tasks", [1, 3, 70, 700])
@pytest.mark.parametrize("latents", [31, 32])
@pytest.mark.parametrize(
    ("hidden", "activations"), [((48, 33), ["silu", "relu"]), ((33,), ["relu"])]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lower_precision(dtype, hidden, activations, latents, tasks):
    layers, network = text((latents, *hidden), activations), text((5, 33, 3), "tanh")
    tensors = [*given((latents, 33), (5, 33, 3), tasks, 3)[:4], *trunk_of(layers)]
    narrow = [t.detach().to(dtype).requires_grad_() for t in tensors]

    grad = draw(tasks, 3, 3, dtype=dtype)

    def results(tensors, f):
        x, z, weight, bias, *trunk = tensors
        y = f(x, z, trunk, weight, bias, None, layers, network)
        return y, *torch.autograd.grad(y, tensors, grad.to(y.dtype))

    exact = results([t.detach().double().requires_grad_() for t in narrow], specification)
    plain = results(narrow, specification)
    for one, other, truth in zip(results(narrow, ops.run), plain, exact, strict=True):
        assert_as_good(one, other, truth, roundings=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_result_does_not_depend_on_threads(dtype):
    layers, network = text((32, 48, 33), "tanh,silu"), text((5, 33, 3), "tanh")
    x, z, weight, bias, ids = given((32, 33), (5, 33, 3), 900, 2)
    args = [t.detach().to(dtype) for t in (x, z, weight, bias)]
    trunk = trunk_of(layers, grad=False, dtype=dtype)
    given_to = args[0], args[1], trunk, *args[2:], ids
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            y, *kept = ops.trunk_mlp(*given_to, layers, network, True)
            back = ops.trunk_mlp_backward(y, *given_to, *kept, layers, network, [True] * 5)
            found.append((y, *kept, *back))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


def test_opcheck(dynamo):
    layers, network = text((5, 6, 4), "tanh,relu"), text((3, 6, 2), "tanh")
    x, z, weight, bias, ids = [
        None if t is None else t.detach() for t in given((5, 4), (3, 6, 2), 7, 5)
    ]
    args = x, z, trunk_of(layers, grad=False), weight, bias, ids
    torch.library.opcheck(ops.trunk_mlp, (*args, layers, network, True))
    y, *kept = ops.trunk_mlp(*args, layers, network, True)
    for mask in ([True] * 5, [False, True, False, True, False]):
        torch.library.opcheck(ops.trunk_mlp_backward, (y, *args, *kept, layers, network, mask))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({1: torch.randn(3, 4)}, r"z.size\(1\) must be 5 .* got \(3, 4\)"),
        ({1: torch.randn(3, 5).double()}, "must have the dtype of z, float64, got float32"),
        ({1: torch.randn(5)}, r"z must have shape \(B, latents\), got \(5,\)"),
        ({2: [torch.randn(4, 5)]}, "trunk must hold more than 1 tensors"),
        ({2: [torch.randn(4, 5), torch.randn(4), torch.randn(4)]}, "trunk must hold 2 tensors"),
        ({2: [torch.randn(5, 4), torch.randn(4)]}, r"trunk\[0\].size\(0\) must be 4"),
        ({2: [torch.randn(4, 5), torch.randn(3)]}, r"trunk\[1\].size\(0\) must be 4"),
        ({3: torch.randn(8, 3)}, "weight.* must be 4"),
        ({6: "5 > 4 b nothing"}, "nothing"),
        ({6: "5 > 4 s"}, "shared"),
    ],
)
def test_what_does_not_fit_is_refused(change, match):
    args = [torch.randn(3, 2, 3), torch.randn(3, 5), [torch.randn(4, 5), torch.randn(4)]]
    args += [torch.randn(8, 4), torch.randn(8), None, "5 > 4 b relu", "3 > 2 b", False]
    ops.trunk_mlp(*args)
    for n, value in change.items():
        args[n] = value
    with pytest.raises((ValueError, RuntimeError), match=match):
        ops.trunk_mlp(*args)


@pytest.mark.parametrize("features", [torch.randn(2, 4), torch.randn(3, 3), torch.randn(3)])
def test_features_that_do_not_fit_are_refused(features):
    args = torch.randn(3, 2, 3), torch.randn(3, 5), [torch.randn(4, 5), torch.randn(4)]
    args = *args, torch.randn(8, 4), torch.randn(8), None
    texts = "5 > 4 b relu", "3 > 2 b"
    y, h, kept = ops.trunk_mlp(*args, *texts, True)
    ops.trunk_mlp_backward(y, *args, h, kept, *texts, [True] * 5)
    with pytest.raises((ValueError, RuntimeError), match=r"^h must have shape|h\.size"):
        ops.trunk_mlp_backward(y, *args, features, kept, *texts, [True] * 5)
