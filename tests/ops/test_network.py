"""Whole networks as one op against their layers: values, every gradient, and what is refused."""

from itertools import product

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from hyperfast.activations import KNOWN
from hyperfast.ops import network as networks
from tests.support.budget import close
from tests.support.networks import (
    MIXED,
    apply_stored,
    expected,
    expected_stored,
    random,
    random_for,
    stored,
    stored_for,
    text,
)

ops = torch.ops.hyperfast
LAST = ("identity", "tanh", "sin:0.5")
# sizes of the network, tasks, rows a task, features
SIZES = [
    ((3, 6, 2), 3, 5, 4),
    ((1, 1), 1, 1, 1),
    ((63, 3, 63, 1), 3, 1, 3),
    ((3, 65, 7), 70, 1, 63),
    ((2, 32, 1), 5, 70, 3),
    ((4, 33, 33, 3), 2, 300, 9),
    ((5, 3, 2), 0, 2, 3),
    ((5, 3, 2), 3, 0, 2),
]


@pytest.mark.parametrize("ragged", [False, True], ids=["batched", "ragged"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("activation", [*KNOWN, "leaky_relu:0.2", "sin:3.0"])
def test_value_and_gradients(activation, size, ragged):
    sizes = size[0]
    for last, bias, target_bias in product(LAST[:2], (False, True), (False, True)):
        args = random(*size, ragged=ragged, bias=bias, target_bias=target_bias)
        net = text(sizes, ",".join([activation] * (len(sizes) - 2) + [last]), target_bias)
        y = expected(*args, net)
        weight = torch.randn_like(y)
        tensors = [a for a in args[:4] if a is not None]
        gradients = torch.autograd.grad(y, tensors, weight)
        for keep in (True, False):
            ours, hidden = ops.hyper_mlp(*args, net, keep)
            close(ours, y)
            assert bool(hidden.numel()) <= keep
            close(torch.autograd.grad(ours, tensors, weight), gradients)


@pytest.mark.parametrize("ragged", [False, True], ids=["batched", "ragged"])
@pytest.mark.parametrize(("tasks", "rows"), [(3, 5), (1, 1), (70, 1), (5, 70), (2, 0), (0, 2)])
@pytest.mark.parametrize("net", MIXED)
def test_mixed_biases_and_transforms(net, tasks, rows, ragged):
    for bias in (False, True):
        args = random_for(net, tasks, rows, 4, ragged=ragged, bias=bias)
        y = expected(*args, net)
        weight = torch.randn_like(y)
        tensors = [a for a in args[:4] if a is not None]
        gradients = torch.autograd.grad(y, tensors, weight)
        for keep in (True, False):
            ours, hidden = ops.hyper_mlp(*args, net, keep)
            close(ours, y)
            close(torch.autograd.grad(ours, tensors, weight), gradients)
        with torch.no_grad():
            plain, hidden = networks._hyper_mlp(*args, net, True)
            close(plain, y)
            mask = [a is not None for a in args[:4]]
            found = networks._hyper_mlp_backward(weight, *args, hidden, net, mask)
        close([g for g, wanted in zip(found, mask, strict=True) if wanted], list(gradients))


@pytest.mark.parametrize("mask", list(product((False, True), repeat=4)))
def test_only_the_gradients_asked_for(mask):
    size = SIZES[0]
    args = random(*size)
    net = text(size[0], "tanh,identity")
    y, hidden = ops.hyper_mlp(*args, net, True)
    with torch.no_grad():
        full = ops.hyper_mlp_backward(y, *args, hidden, net, [True] * 4)
        some = ops.hyper_mlp_backward(y, *args, hidden, net, mask)
    for wanted, one, other in zip(mask, some, full, strict=True):
        assert torch.equal(one, other) if wanted else one.numel() == 0


@pytest.mark.parametrize(
    "net", ["3 > 4 b sin:2.0, 2 b tanh", "3 > 4 sin:2.0 square(W), 2 b exp(W)"]
)
@pytest.mark.parametrize("ragged", [False, True], ids=["batched", "ragged"])
def test_derivatives_of_derivatives(ragged, net):
    args = random_for(net, 3, 2, 3, ragged=ragged)
    ids = args.pop()

    def f(*tensors):
        return ops.hyper_mlp(*tensors, ids, net, True)[0]

    assert gradcheck(f, args)
    assert gradgradcheck(f, args)


def test_gradients_where_one_argument_comes_of_another():
    """The output of a network fed to it again: both orders count each path once."""
    args = random((3, 4, 3), 3, 2, 3)
    ids = args.pop()
    net = text((3, 4, 3), "sin:2.0,tanh")
    flat = torch.randn(3, 31, dtype=torch.float64, requires_grad=True)

    def twice(f, x, *rest):
        return f(f(x, *rest), *rest).square().sum()

    def generated(x, *rest):
        return ops.hyper_mlp(x, *rest, ids, net, True)[0]

    def plain(x, *rest):
        return expected(x, *rest, ids, net)

    def stored_op(x, w):
        return ops.task_mlp(x, w, None, None, net)

    def stored_layers(x, w):
        return networks.by_task_layers(x, w, None, None, net)

    for ours, theirs, tensors in (
        (generated, plain, args),
        (stored_op, stored_layers, [args[0], flat]),
    ):
        results = []
        for f in (ours, theirs):
            first = torch.autograd.grad(twice(f, *tensors), tensors, create_graph=True)
            penalty = sum(g.square().sum() for g in first)
            second = torch.autograd.grad(penalty, tensors)
            alone = torch.autograd.grad(twice(f, *tensors), tensors)
            results.append((first, second, alone))
        close(*results)


def test_a_gradient_passes_a_nan_as_in_pytorch():
    args = random((3, 4, 2), 5, 1, 3)
    with torch.no_grad():
        args[0][1] = torch.nan
    net = text((3, 4, 2), "relu,identity")
    y = ops.hyper_mlp(*args, net, True)[0]
    want = expected(*args, net)
    tensors = args[:2]
    for one, other in zip(
        torch.autograd.grad(y.nansum(), tensors),
        torch.autograd.grad(want.nansum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(one, other, equal_nan=True, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("grad", [False, True], ids=["plain", "grad"])
def test_opcheck(grad, dynamo):
    args = random((3, 4, 2), 3, 2, 3, grad=grad)
    torch.library.opcheck(ops.hyper_mlp.default, (*args, text((3, 4, 2), "elu"), grad))
    hidden = torch.randn(3 * 2 * 4, dtype=torch.float64)
    args = [*random((3, 4, 2), 3, 2, 3, grad=False), hidden, text((3, 4, 2), "elu")]
    y = torch.randn(3, 2, 2, dtype=torch.float64)
    torch.library.opcheck(ops.hyper_mlp_backward.default, (y, *args, [True, True, False, True]))


@pytest.mark.parametrize("ragged", [False, True], ids=["batched", "ragged"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_stored_networks(size, ragged):
    sizes, tasks, rows, _ = size
    x, weight, ids = stored(sizes, tasks, rows, ragged=ragged)
    net = text(sizes, "silu")
    y = ops.task_mlp(x, weight, None, ids, net)
    close(y, apply_stored(x, weight, ids, net))


@pytest.mark.parametrize("ragged", [False, True], ids=["batched", "ragged"])
@pytest.mark.parametrize(("tasks", "rows"), [(3, 5), (1, 1), (70, 1), (5, 70), (2, 0), (0, 2)])
@pytest.mark.parametrize("net", [*MIXED, "63 > 3 b relu, 63 b, 1 b sigmoid"])
def test_stored_networks_and_their_gradients(net, tasks, rows, ragged):
    x, weight, ids = stored_for(net, tasks, rows, ragged=ragged, scale=0.3)
    close(ops.task_mlp(x, weight, None, ids, net), apply_stored(x, weight, ids, net))
    tensors = x.requires_grad_(), weight.requires_grad_()
    y = expected_stored(x, weight, ids, net)
    grad = torch.randn_like(y)
    gradients = torch.autograd.grad(y, tensors, grad)
    close(torch.autograd.grad(ops.task_mlp(x, weight, None, ids, net), tensors, grad), gradients)
    with torch.no_grad():
        found = networks._task_mlp_backward(grad, x, weight, ids, net, [True, True])
    close(found, gradients)


@pytest.mark.parametrize("mask", list(product((False, True), repeat=2)))
@pytest.mark.parametrize("rows", [2, 20])
def test_only_the_gradients_of_stored_networks_asked_for(mask, rows):
    net = MIXED[0]
    x, weight, ids = stored_for(net, 3, rows, ragged=True)
    grad = torch.randn(len(x), 2, dtype=torch.float64)
    for backward in (ops.task_mlp_backward, networks._task_mlp_backward):
        full = backward(grad, x, weight, ids, net, [True, True])
        some = backward(grad, x, weight, ids, net, mask)
        for wanted, one, other in zip(mask, some, full, strict=True):
            assert torch.equal(one, other) if wanted else one.shape == (0,)


@pytest.mark.parametrize("net", ["3 > 4 b tanh, 2 b", "3 > 4 tanh square(W), 2 b softplus(W)"])
@pytest.mark.parametrize("ragged", [False, True], ids=["batched", "ragged"])
def test_gradients_of_stored_networks(ragged, net, dynamo):
    x, weight, ids = stored_for(net, 3, 2, ragged=ragged)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    assert gradcheck(lambda x, w: ops.task_mlp(x, w, None, ids, net), (x, weight))
    assert gradgradcheck(lambda x, w: ops.task_mlp(x, w, None, ids, net), (x, weight))
    torch.library.opcheck(ops.task_mlp.default, (x, weight, None, ids, net))
    grad = torch.randn(*x.shape[:-1], 2, dtype=torch.float64)
    args = grad, x.detach(), weight.detach(), ids, net
    for mask in ([True, True], [False, True]):
        torch.library.opcheck(ops.task_mlp_backward.default, (*args, mask))


def test_stored_networks_compile_whole(dynamo):
    net = MIXED[0]
    x, weight, ids = stored_for(net, 3, 2, ragged=True)
    tensors = x.requires_grad_(), weight.requires_grad_()

    def loss(x, weight):
        return ops.task_mlp(x, weight, None, ids, net).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    close(
        torch.autograd.grad(compiled(*tensors), tensors),
        torch.autograd.grad(loss(*tensors), tensors),
    )


def test_many_gradients_of_stored_networks_at_once():
    net = MIXED[0]
    x, weight, _ = stored_for(net, 3, 2, ragged=False)
    tensors = x.requires_grad_(), weight.requires_grad_()
    grads = torch.randn(4, 3, 2, 2, dtype=torch.float64)

    def backward(grad, batched=False):
        y = ops.task_mlp(*tensors, None, None, net)
        return torch.autograd.grad(y, tensors, grad, is_grads_batched=batched)

    apart = [torch.stack(g) for g in zip(*map(backward, grads), strict=True)]
    close(list(backward(grads, True)), apart)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({0: torch.randn(3, 2, 5)}, "grad"),
        ({0: torch.randn(3, 1, 2)}, "rows"),
        ({1: torch.randn(3, 2, 4)}, "x"),
        ({2: torch.randn(3, 25)}, "weight"),
        ({2: torch.randn(2, 26)}, "task"),
        ({4: "3 > 4 s tanh, 2 b"}, "no shared biases"),
    ],
)
def test_what_does_not_fit_gradients_of_stored_networks(change, match):
    args = [torch.randn(3, 2, 2), torch.randn(3, 2, 3), torch.randn(3, 26), None]
    args += ["3 > 4 b tanh, 2 b", [True, True]]
    for n, value in change.items():
        args[n] = value
    for backward in (ops.task_mlp_backward, networks._task_mlp_backward):
        with pytest.raises(ValueError, match=match):
            backward(*args)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({5: "3 > 4 b, 3 b"}, ValueError, "weight"),
        ({5: "3"}, ValueError, "network"),
        ({5: "3 > 0 b, 2 b"}, ValueError, "network"),
        ({5: "3 > 4 b relu 2 b"}, ValueError, "network"),
        ({5: "3 > 4 b what, 2 b"}, ValueError, "network"),
        ({5: "3 > 4 b sin:x, 2 b"}, ValueError, "network"),
        ({5: "3 > 4 b relu, 2"}, ValueError, "weight"),
        ({5: "3 > 4 s relu, 2 s"}, ValueError, "no shared biases"),
        ({5: "3 > 4 b relu, 2 s abs(W)"}, ValueError, "no shared biases"),
        ({0: torch.randn(3, 2, 5, dtype=torch.float64)}, ValueError, "x"),
        ({1: torch.randn(2, 3, dtype=torch.float64)}, ValueError, "task"),
        ({3: torch.randn(7, dtype=torch.float64)}, ValueError, "bias"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, match):
    args = [*random((3, 4, 2), 3, 2, 3, grad=False), text((3, 4, 2), "relu"), False]
    for n, value in change.items():
        args[n] = value
    with pytest.raises(error, match=match):
        ops.hyper_mlp(*args)


@pytest.mark.parametrize("task", [-1, 3])
def test_ids_out_of_range(task):
    args = random((3, 4, 2), 3, 2, 3, ragged=True, grad=False)
    args[4][2] = task
    with pytest.raises(IndexError, match="task_ids"):
        ops.hyper_mlp(*args, text((3, 4, 2), "relu"), False)
    x, weight, ids = stored((3, 4, 2), 3, 2, ragged=True)
    ids[1] = task
    with pytest.raises(IndexError, match="task_ids"):
        ops.task_mlp(x, weight, None, ids, text((3, 4, 2), "relu"))
    grad = torch.randn(len(x), 2, dtype=torch.float64)
    with pytest.raises(IndexError, match="task_ids"):
        ops.task_mlp_backward(grad, x, weight, ids, text((3, 4, 2), "relu"), [True, True])
