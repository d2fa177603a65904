"""Whole networks in C++: every dtype, layout and instruction set, against the layers in float64."""

import os
import subprocess
import sys
import timeit
from functools import partial

import pytest
import torch

from hyperfast.activations import KNOWN
from hyperfast.layout import Network
from hyperfast.ops import network as networks
from hyperfast.plans.cpu import EXTENSION, EXTENSION_ERROR
from tests.support.budget import assert_as_good
from tests.support.networks import MIXED, expected, expected_stored, text

if EXTENSION is None:
    pytest.skip(EXTENSION_ERROR, allow_module_level=True)

op = torch.ops.hyperfast
pytestmark = pytest.mark.usefixtures("nan_poison")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# sizes, tasks, rows a task, features: few rows and many, few tasks and many, narrow and wide
CASES = [
    ((64, 64, 10), 1, 1, 64),
    ((8, 32, 1), 70, 1, 33),
    ((17, 65, 3), 40, 6, 16),
    ((12, 32, 9), 400, 2, 40),
    ((5, 63, 66, 4), 9, 20, 7),
    ((2, 32, 1), 130, 49, 5),
    ((2, 33, 1), 12, 70, 12),
    ((2, 64, 64, 1), 2, 700, 24),
    ((2, 9, 3), 3, 2049, 5),
    ((3, 5, 2), 0, 4, 3),
    ((3, 5, 2), 0, 2049, 3),
    ((3, 5, 2), 4, 0, 3),
]


def spread(t):
    """The same numbers with NaN between the elements."""
    return torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]


def random(net, tasks, rows, features, dtype, ragged, gaps):
    """Arguments up to the network; with gaps, NaN lies between the elements."""
    net = Network.parse(net)
    scale = (features * max(net.sizes)) ** -0.5
    lead = (tasks * rows,) if ragged else (tasks, rows)
    ids = torch.randperm(tasks * rows) % max(tasks - 1, 1) if ragged else None
    made = [(*lead, net.sizes[0]), (tasks, features), (net.numel, features), (net.numel,)]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in made]
    tensors[2] *= scale
    tensors[3] *= max(net.sizes) ** -0.5
    tensors = [t.to(dtype) for t in tensors]
    return [*(map(spread, tensors) if gaps else tensors), ids]


def wide(args):
    return [a.double() if a is not None and a.is_floating_point() else a for a in args]


def specification(args, net, grad):
    """Output and gradients of the layers by the specification, differentiated by PyTorch."""
    tensors = [a.detach().clone().requires_grad_() for a in args[:4]]
    y = expected(*tensors, args[4], net)
    return [y.detach(), *torch.autograd.grad(y, tensors, grad)]


within = partial(assert_as_good, roundings=8)


@pytest.mark.parametrize("ragged", [False, True], ids=["batched", "ragged"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(dtype, case, ragged):
    gaps = ragged == (len(case[0]) % 2 == 0)
    for last in ("identity", "tanh"):
        net = text(case[0], ",".join(["sin:1.5"] * (len(case[0]) - 2) + [last]))
        args = random(net, *case[1:], dtype, ragged, gaps)
        check_against_layers(args, net)


@pytest.mark.parametrize("ragged", [False, True], ids=["batched", "ragged"])
@pytest.mark.parametrize(("tasks", "rows"), [(1, 1), (70, 1), (20, 6), (12, 30), (3, 100), (2, 0)])
@pytest.mark.parametrize("net", MIXED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_biases_and_transforms(dtype, net, tasks, rows, ragged):
    args = random(net, tasks, rows, 7, dtype, ragged, ragged)
    check_against_layers(args, net)


def check_against_layers(args, net):
    y, hidden = op.hyper_mlp(*args, net, True)
    assert torch.equal(op.hyper_mlp(*args, net, False)[0], y)
    grad = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)
    exact = specification(wide(args), net, grad.double())
    theirs = specification(args, net, grad)
    within(y, theirs[0], exact[0])
    for z in (hidden, hidden.new_empty(0)):  # kept, or computed again
        found = op.hyper_mlp_backward(grad, *args, z, net, [True] * 4)
        for result in zip(found, theirs[1:], exact[1:], strict=True):
            within(*result)


@pytest.mark.parametrize(
    ("features", "row", "first"), [(8, 8, 0), (8, 10, 2), (8, 9, 0), (8, 8, 1), (9, 10, 0)]
)
@pytest.mark.parametrize("rows", [1, 5, 50])
@pytest.mark.parametrize("tasks", [7, 33, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_the_head_begin_anywhere(dtype, tasks, rows, features, row, first):
    """Those of bf16 are read in pairs, from any address; networks are made in strips of 32 by 48
    parameters, in pairs 64 parameters at a time, and of few rows in lanes."""
    net = text((5, 16, 3), "tanh")
    args = random(net, tasks, rows, features, dtype, False, False)
    storage = torch.full((first + args[2].shape[0] * row,), torch.nan, dtype=dtype)
    head = storage[first:].view(-1, row)[:, :features]
    args[2] = head.copy_(args[2])
    check_against_layers(args, net)


@pytest.mark.parametrize(("tasks", "rows", "features"), [(47, 50, 8), (47, 50, 7), (19, 2050, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_networks_than_are_held_at_a_time(dtype, tasks, rows, features):
    """Of 54,450 parameters, in two blocks whose gradients add up; of more rows than a piece has,
    the gradients of both pieces are held. A head of bf16 is packed once for both, an odd feature
    beside nothing."""
    net = text((16, 250, 200), "elu")
    args = random(net, tasks, rows, features, dtype, False, False)
    y, hidden = op.hyper_mlp(*args, net, True)
    grad = torch.randn_like(y)
    exact = specification(wide(args), net, grad.double())
    theirs = specification(args, net, grad)
    within(y, theirs[0], exact[0])
    for mask in ([True] * 4, [False, True, True, True]):  # all weights are needed, or the last
        found = op.hyper_mlp_backward(grad, *args, hidden, net, mask)
        for result, wanted, *other in zip(found, mask, theirs[1:], exact[1:], strict=True):
            if wanted:
                within(result, *other)


@pytest.mark.parametrize("activation", ["elu", "tanh", "sin"])
@pytest.mark.parametrize("case", [*CASES[:7], ((1, 63), 4001, 1, 33)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_result_does_not_depend_on_threads(dtype, case, activation):
    before = torch.get_num_threads()
    try:
        net = text(case[0], ",".join([activation] * (len(case[0]) - 1)))
        args = random(net, *case[1:], dtype, False, False)
        results = []
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            y, hidden = op.hyper_mlp(*args, net, True)
            results.append((y, hidden))
            for z in (hidden, hidden.new_empty(0)):
                results[-1] += op.hyper_mlp_backward(y, *args, z, net, [True] * 4)
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


@pytest.mark.parametrize(
    ("net", "tasks", "rows", "features"),
    [
        ("2 > 3 b", 3000, 48, 4),
        ("33 > 63 b relu, 17 b", 520, 16, 5),
        ("33 > 63 b relu, 17 b", 520, 16, 0),
    ],
)
def test_a_sum_over_all_rows_loses_no_more_digits_than_pytorch(net, tasks, rows, features):
    """The gradient of the head's bias: of whole networks, layers, and layers without features."""
    torch.manual_seed(0)
    args = random(net, tasks, rows, features or 1, torch.float32, False, False)
    args[1:3] = (t[:, :features] for t in args[1:3])
    grad = torch.randn(tasks, rows, Network.parse(net).sizes[-1]) + 1
    *_, found = op.hyper_mlp_backward(grad, *args, grad.new_empty(0), net, [True] * 4)
    theirs, exact = specification(args, net, grad), specification(wide(args), net, grad)
    assert_as_good(found, theirs[-1], exact[-1])


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "generated"])
def test_where_nothing_is_wanted_nothing_is_made(stored):
    """Both ways back make the weights, or what enters the layers, again: 64 tasks take 5 ms."""
    net, x, h = "128 > 128 b relu, 128 b", torch.randn(64, 8, 128), torch.randn(64, 128)
    weight = torch.randn(64, 33024) if stored else torch.randn(33024, 128)

    def back(wanted):
        if stored:
            return op.task_mlp_backward(x, x, weight, None, net, [wanted] * 2)
        return op.hyper_mlp_backward(x, x, h, weight, None, None, x[:0, 0, 0], net, [wanted] * 4)

    def least(wanted):
        return min(timeit.repeat(lambda: back(wanted), number=1, repeat=5))

    assert all(t.numel() == 0 for t in back(False))
    assert least(False) < least(True) / 10


def test_many_pieces_of_a_task_do_not_drown_in_a_16_bit_sum():
    """200,000 rows in pieces of 2,048: a bf16 total would stop growing."""
    x, h = torch.ones(1, 200_000, 1, dtype=torch.bfloat16), torch.ones(1, 1, dtype=torch.bfloat16)
    head = torch.ones(1, 1, dtype=torch.bfloat16)
    args = (x, h, head, None, None)
    _, grad_h, *_ = op.hyper_mlp_backward(x, *args, x.new_empty(0), "1 > 1", [True] * 4)
    torch.testing.assert_close(grad_h.float().item(), 200_000.0, rtol=0.005, atol=0)


def random_stored(net, tasks, rows, dtype, ragged, gaps):
    """Rows, parameters, a gradient and ids."""
    numel, sizes = Network.parse(net).numel, Network.parse(net).sizes
    x, _, _, _, ids = random(net, tasks, rows, 1, dtype, ragged, gaps)
    weight = (torch.randn(tasks, numel, dtype=torch.float64) / max(sizes) ** 0.5).to(dtype)
    grad = torch.randn(*x.shape[:-1], sizes[-1], dtype=torch.float64).to(dtype)
    return x, *((spread(weight), spread(grad)) if gaps else (weight, grad)), ids


def check_stored(x, weight, grad, ids, net):
    """Values and gradients against the layers."""
    tensors = [t.detach().clone().requires_grad_() for t in (x, weight)]
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    theirs, truth = (expected_stored(*t, ids, net) for t in (tensors, exact))
    within(op.task_mlp(x, weight, None, ids, net), theirs.detach(), truth.detach())
    found = op.task_mlp_backward(grad, x, weight, ids, net, [True, True])
    theirs = torch.autograd.grad(theirs, tensors, grad)
    truth = torch.autograd.grad(truth, exact, grad.double())
    for result in zip(found, theirs, truth, strict=True):
        within(*result)
    for n in range(2):
        mask = [n == 0, n == 1]
        alone = op.task_mlp_backward(grad, x, weight, ids, net, mask)
        assert torch.equal(alone[n], found[n])


@pytest.mark.parametrize("ragged", [False, True], ids=["batched", "ragged"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stored_networks(dtype, case, ragged):
    sizes, tasks, rows, _ = case
    for last in ("identity", "tanh"):
        net = text(sizes, ",".join(["silu"] * (len(sizes) - 2) + [last]))
        check_stored(*random_stored(net, tasks, rows, dtype, ragged, last == "tanh"), net)


@pytest.mark.parametrize("ragged", [False, True], ids=["batched", "ragged"])
@pytest.mark.parametrize(
    ("tasks", "rows"), [(1, 1), (70, 1), (9, 6), (9, 7), (3, 63), (3, 100), (2, 0), (1, 1500)]
)
@pytest.mark.parametrize("net", MIXED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stored_networks_of_mixed_layers(dtype, net, tasks, rows, ragged):
    check_stored(*random_stored(net, tasks, rows, dtype, ragged, ragged), net)


EDGES = [7, 8, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 127, 129, 255, 257, 513]


@pytest.mark.parametrize("rows", EDGES)
@pytest.mark.parametrize(
    "net",
    [
        "2 > 32 b relu, 1 b",
        "2 > 13 b sin:3.0, 64 sin, 1 b sin",
        "10 > 8 b relu, 8 b leaky_relu, 1 b",
        "63 > 32 b tanh, 32 b",
        "3 > 63 b relu abs(W), 3 b relu",
        "1 > 1 b sin",
        "130 > 5 relu, 17 b relu",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rows_at_the_edges_of_vectors(dtype, net, rows):
    """What lies behind the rows in the kernels' own memory is NaN when they start."""
    x, weight, grad, _ = random_stored(net, 3, rows, dtype, False, False)
    nan = [torch.full_like(t, torch.nan) for t in (grad, x, weight)]
    for _ in range(2):
        op.task_mlp(*nan[1:], None, None, net)
        op.task_mlp_backward(*nan, None, net, [True, True])
        check_stored(x, weight, grad, None, net)
        x, weight, grad = x.flip(1), weight, grad.flip(1)


def placed(t, first, gap):
    """The same numbers `first` elements into memory, rows `gap` apart; what is between is NaN."""
    row = t.shape[-1] + gap
    storage = torch.full((first + t.numel() // t.shape[-1] * row,), torch.nan, dtype=t.dtype)
    return storage[first:].view(*t.shape[:-1], row)[..., : t.shape[-1]].copy_(t)


@pytest.mark.parametrize("ragged", [False, True], ids=["batched", "ragged"])
@pytest.mark.parametrize(("first", "gap"), [(0, 0), (1, 0), (2, 1), (1, 2), (0, 2)])
@pytest.mark.parametrize("rows", [3, 7, 33, 530])
@pytest.mark.parametrize(
    "net",
    [
        "6 > 9 b relu, 2 b",
        "7 > 9 b tanh, 3 b",
        "2 > 5 relu, 1",
        "3 > 6",
        "1 > 3 b relu, 1 b",
        "451 > 7 relu, 2 b",
        "4 > 3 exp(W), 2",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_and_weights_begin_anywhere(dtype, net, rows, first, gap, ragged):
    """In the first layer both are multiplied in pairs if they are of bf16, and many."""
    x, weight, grad, ids = random_stored(net, 3, rows, dtype, ragged, False)
    check_stored(placed(x, first, gap), placed(weight, first, gap), grad, ids, net)


@pytest.mark.parametrize("rows", [49, 64, 65, 130])
@pytest.mark.parametrize("net", ["2 > 32 b relu, 1 b", "10 > 8 b sin:2.0, 8 relu exp(W), 3 b"])
@pytest.mark.parametrize("ragged", [False, True], ids=["batched", "ragged"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_networks_that_threads_share(dtype, ragged, net, rows):
    check_against_layers(random(net, 60, rows, 5, dtype, ragged, False), net)


@pytest.mark.parametrize("rows", [5, 40, 64, 65])
def test_sines_of_many_turns_beside_others(rows):
    """A vector of rows holds arguments that the polynomials know, and one that they do not."""
    x = torch.linspace(-9, 9, rows)
    x[rows // 2], x[rows // 3], x[0] = 123456.7, -8193.5, 1e30
    x = x.view(1, rows, 1)
    weight = torch.ones(1, 14)
    y = op.task_mlp(x, weight, None, None, "1 > 7 sin:0.5, 1")
    turns = 0.5 * x.double()
    torch.testing.assert_close(y.double(), 7 * turns.sin(), rtol=0, atol=7 * 3 * 2.0**-24)
    grad_x, grad = op.task_mlp_backward(
        torch.ones_like(y), x, weight, None, "1 > 7 sin:0.5, 1", [True, True]
    )
    torch.testing.assert_close(grad_x.double(), 3.5 * turns.cos(), rtol=0, atol=7 * 3 * 2.0**-24)
    torch.testing.assert_close(
        grad[0, 7:].double(), turns.sin().sum().expand(7), rtol=0, atol=rows * 3 * 2.0**-24
    )


@pytest.mark.parametrize("rows", [9, 40, 65])
def test_what_overflows_behind_the_rows_is_not_theirs(rows):
    """Lanes without a row hold what a row of zeros would give: 4e38 in the second layer."""
    x = torch.full((1, rows, 1), 1.99e38)
    weight = torch.tensor([[-1.0, 2e38, *[2.0] * 32, *[1e-36] * 32]])
    net = "1 > 1 b relu, 32 relu, 1"
    y = op.task_mlp(x, weight, None, None, net)
    exact = x.double().requires_grad_(), weight.double().requires_grad_()
    truth = expected_stored(*exact, None, net)
    torch.testing.assert_close(y.double(), truth.detach(), rtol=1e-4, atol=0)
    unit = torch.full_like(y, 1e-3)
    found = op.task_mlp_backward(unit, x, weight, None, net, [True, True])
    for got, want in zip(found, torch.autograd.grad(truth, exact, unit.double()), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize(
    ("net", "rows", "features", "kept"),
    [
        ("2 > 32 b relu, 1 b", 64, 128, False),
        ("2 > 32 b relu, 1 b", 40, 128, True),
        ("64 > 64 b relu, 10 b", 64, 128, True),
        ("64 > 64 b relu, 10 b", 128, 128, False),
        ("2 > 64 b sin, 64 b sin, 1 b", 4096, 256, False),
        ("2 > 400 b sin, 400 b sin, 1 b", 4096, 256, True),
    ],
)
def test_what_training_keeps(net, rows, features, kept):
    assert EXTENSION.keeps(net, "float32", False, 16, 16 * rows, features) == kept


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_stored_networks_of_any_strides(rows):
    """Shared weights, rows and gradients; rows that lie column by column."""
    net = MIXED[1]
    x, weight, grad, _ = random_stored(net, 3, rows, torch.float32, False, False)
    for given in (
        (x, weight[:1].expand_as(weight), grad),
        (x[:1].expand_as(x), weight, grad),
        (x[:, :1, :1].expand_as(x), weight, grad[:1, :1, :1].expand_as(grad)),
        [t.mT.contiguous().mT for t in (x, weight, grad)],
        [x.transpose(0, 1).contiguous().transpose(0, 1), weight, grad.mT.contiguous().mT],
    ):
        check_stored(*given, None, net)


@pytest.mark.parametrize("ragged", [False, True], ids=["batched", "ragged"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_stored_networks_of_8_bits(case, ragged):
    sizes, tasks, rows, _ = case
    for net in (text(sizes, "silu"), *MIXED):
        whole = Network.parse(net)
        x, _, _, ids = random_stored(net, tasks, rows, torch.float32, ragged, True)
        weight = torch.randint(-127, 128, (tasks, whole.weight_numel), dtype=torch.int8)
        scales = torch.randn(tasks, whole.vector_numel) / 100
        exact = networks.by_task_layers(x.double(), weight, scales.double(), ids, net)
        theirs = networks.by_task_layers(x, weight, scales, ids, net)
        within(op.task_mlp(x, weight, scales, ids, net), theirs, exact)


@pytest.mark.parametrize(
    ("net", "tasks", "rows"),
    [(MIXED[0], 1, 20_000), (MIXED[1], 300, 2), (MIXED[1], 9, 40), (MIXED[2], 3, 2000)],
)
@pytest.mark.parametrize("ragged", [False, True], ids=["batched", "ragged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_stored_networks_do_not_depend_on_threads(dtype, net, tasks, rows, ragged):
    args = random_stored(net, tasks, rows, dtype, ragged, False)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            x, weight, grad, ids = args
            y = op.task_mlp(x, weight, None, ids, net)
            results.append([y, *op.task_mlp_backward(grad, x, weight, ids, net, [True, True])])
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


@pytest.mark.parametrize("columns", [1, 2, 3, 34])
@pytest.mark.parametrize("rows", [3, 9, 1001])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_outputs_of_16_bits_are_rounded_to_nearest(dtype, rows, columns):
    x = torch.randn(1, rows, 1).to(dtype)
    x[0, :3, 0] = torch.tensor([torch.nan, torch.inf, 0])
    weight = torch.randn(1, 2 * columns).to(dtype)
    weight[0, columns] = torch.finfo(dtype).smallest_normal / 2
    y = op.task_mlp(x, weight, None, None, f"1 > {columns} b")
    exact = x.double() * weight[:, None, :columns].double() + weight[:, None, columns:].double()
    assert torch.equal(y.isnan(), exact.isnan())
    assert torch.equal(y.nan_to_num(7), exact.float().to(dtype).nan_to_num(7))


def test_gradients_of_one_network_do_not_drown_in_a_16_bit_sum():
    """200,000 rows in many pieces: a bf16 total would stop growing."""
    x, weight = torch.ones(1, 200_000, 1, dtype=torch.bfloat16), torch.ones(1, 2).bfloat16()
    _, grad = op.task_mlp_backward(x, x, weight, None, "1 > 1 b", [False, True])
    torch.testing.assert_close(grad.float(), torch.full((1, 2), 2e5), rtol=0.005, atol=0)


def alone(name):
    """The text of a network that is one activation."""
    return "1 > 1 b" + ("" if name == "identity" else f" {name}")


# PyTorch's own, in double, are 0 from -9 on.
EXACT = {
    "gelu": lambda x: x * torch.special.erfc(x * -(0.5**0.5)) / 2,
    "gelu_tanh": lambda x: x * torch.sigmoid((8 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)),
}


@pytest.mark.parametrize("scale", [0.01, 1.0, 20.0, 2000.0, 1e6])
@pytest.mark.parametrize("name", [*KNOWN, "leaky_relu:0.2", "sin:3.0"])
def test_activations_to_the_last_bits(name, scale):
    """Within 3 units in the last place of the correctly rounded value, or of what PyTorch does."""
    x = torch.linspace(-scale, scale, 4001).view(1, -1, 1)
    unit = torch.ones(1, 2)
    unit[0, 1] = 0
    y = op.task_mlp(x, unit, None, None, alone(name)).flatten().double()
    value = Network.parse(alone(name)).layers[0].activate
    exact = EXACT.get(name, value)(x.flatten().double())
    theirs = (value(x.flatten()).double() - exact).abs()
    last = torch.finfo(torch.float32).eps * exact.abs().clamp(min=2.0**-126)
    # A sine next to a multiple of pi: as many places of its argument as floats have, no more.
    last = last.clamp(min=2.0**-24) if name.startswith("sin") else last
    assert bool(((y - exact).abs() <= 3 * last + theirs).all())


def floats_around(x, count=300):
    """The floats next to x, `count` on either side."""
    bits = torch.tensor(x).view(torch.int32) + torch.arange(-count, count + 1, dtype=torch.int32)
    return bits.view(torch.float32)


@pytest.mark.parametrize("form", ["exp(W)", "elu"])
def test_powers_of_e_at_their_ends(form):
    """Where they overflow, become subnormal, and vanish; and where 2^n alone would."""
    ends = [k * 0.6931472 for k in (127, 127.5, 128, 0.5, -0.5, -126, -127.5, -128, -149, -150)]
    x = torch.cat(
        [*map(floats_around, [*ends, 89.0, -104.0, 1e30, -1e30]), torch.arange(-110.0, 95)]
    )
    x = torch.cat([x, torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-42, -1e-42])])
    if form == "elu":
        y = op.task_mlp(x.view(1, -1, 1), torch.ones(1, 1), None, None, "1 > 1 elu").flatten()
        exact = torch.nn.functional.elu(x.double())
    else:
        y = op.task_mlp(torch.ones(len(x), 1, 1), x[:, None], None, None, "1 > 1 exp(W)").flatten()
        exact = x.double().exp()
    rounded = exact.float()
    assert torch.equal(y.isnan(), rounded.isnan())
    assert torch.equal(y.isinf(), rounded.isinf())
    finite = rounded.isfinite()
    y, exact = y[finite].double(), exact[finite]
    last = torch.finfo(torch.float32).eps * exact.abs().clamp(min=2.0**-126)
    assert bool(((y - exact).abs() <= 2 * last).all())


@pytest.mark.parametrize("name", KNOWN)
def test_activations_of_what_is_not_finite(name):
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-42, 3e38, -3e38])
    for dtype in (torch.float32, torch.float64):
        values = x.to(dtype).view(1, -1, 1)
        weight = torch.tensor([[1.0, 0.0]], dtype=dtype)
        y = op.task_mlp(values, weight, None, None, alone(name)).flatten()
        value = Network.parse(alone(name)).layers[0].activate(x.double()).to(dtype)
        torch.testing.assert_close(y, value, equal_nan=True, rtol=1e-6, atol=1e-42)


@pytest.mark.parametrize("isa", EXTENSION.isas())
@pytest.mark.skipif("HYPERFAST_ISA" in os.environ, reason="this is such a run")
def test_every_instruction_set(isa):
    if isa == EXTENSION.isa():
        return  # the tests above ran it
    environment = {**os.environ, "HYPERFAST_ISA": isa}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    if isa == "amx_emulated":  # networks large enough for a matrix unit; the rest is that of avx512
        command += ["-k", "test_values_and_gradients and 400"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
