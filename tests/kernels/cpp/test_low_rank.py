"""Layers of low rank, one op each way, against the specification differentiated by autograd."""

import timeit
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from hyperfast import TaskLinear, use_backend
from hyperfast.kernels import reference
from hyperfast.ops import add_low_rank_, low_rank, low_rank_backward
from hyperfast.plans.cpu import EXTENSION, EXTENSION_ERROR
from tests.kernels.cpp.test_layers import mix, strided
from tests.support.budget import assert_as_good, close, norm
from tests.support.draw import draw

pytestmark = [
    pytest.mark.skipif(EXTENSION is None, reason=EXTENSION_ERROR or "built"),
    pytest.mark.usefixtures("nan_poison"),
]

SIZES = [  # tasks, rows, in, out, rank
    (1, 1, 1, 1, 1),
    (3, 2, 17, 63, 1),
    (5, 7, 129, 33, 3),
    (4, 8, 64, 65, 8),
    (6, 9, 100, 40, 9),
    (2, 5, 65, 130, 63),
    (3, 130, 31, 20, 8),  # pieces of one task, whose columns threads share
    (2, 300, 200, 3, 4),
    (0, 3, 4, 5, 2),
    (3, 0, 4, 5, 2),
    (3, 2, 0, 5, 2),
    (3, 2, 4, 0, 2),
    (2, 300, 5, 4, 0),
]
rand = partial(draw, seed=0)


def problem(size, ragged, how="plain", dtype=torch.float64):
    """grad, and x, a, b, bias, init, task_ids; the last task, of several, names no row."""
    tasks, rows, ins, outs, rank = size
    ids = mix(rows, tasks)[0].clamp(max=max(tasks - 2, 0)) if ragged else None
    lead = (tasks * rows,) if ragged else (tasks, rows)
    shapes = (*lead, outs), (*lead, ins), (tasks, rank, ins), (tasks, outs, rank), (tasks, outs)
    made = [rand(*s, seed=n, dtype=dtype) for n, s in enumerate((*shapes, shapes[0]))]
    grad, x, a, b, bias, init = (strided(t, how) for t in made)
    return grad, (x, a, b, bias, init, ids)


def specified(grad, args):
    """The value, and the gradients of x, a, b and bias."""
    leaves = [t.detach().requires_grad_() for t in args[:4]]
    y = reference.low_rank(*leaves, *args[4:])
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def by_ops(grad, args):
    x, a, b, _, _, ids = args
    return [low_rank(*args), *low_rank_backward(grad, x, a, b, ids, [True] * 4)]


@pytest.mark.parametrize("how", ["plain", "transposed", "gaps", "outer gaps"])
@pytest.mark.parametrize("ragged", [False, True], ids=["batched", "ragged"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_value_and_gradients(size, ragged, how):
    grad, args = problem(size, ragged, how)
    close(by_ops(grad, args), specified(grad, args))
    x, a, b, _, init, ids = args
    close(low_rank(x, a, b, None, init, ids), reference.low_rank(x, a, b, None, init, ids))
    close(low_rank(x, a, b, None, None, ids), reference.low_rank(x, a, b, None, None, ids))
    y = init.clone(memory_format=torch.contiguous_format)
    add_low_rank_(y, x, *args[1:4], ids)
    assert torch.equal(y, low_rank(*args))


@pytest.mark.parametrize("ragged", [False, True], ids=["batched", "ragged"])
@pytest.mark.parametrize("size", [*SIZES[:8], (1, 200_000, 3, 4, 1)], ids=str)
def test_float32_is_as_good_as_pytorch(size, ragged):
    grad, args = problem(size, ragged)
    single = [None if t is None or t.dtype == torch.int64 else t.float() for t in args[:5]]
    single = [*single, args[5]]
    found, plain = by_ops(grad.float(), single), specified(grad.float(), single)
    wide = [t if t is None or t.dtype == torch.int64 else t.double() for t in single]
    for ours, theirs, true in zip(
        found, plain, specified(grad.float().double(), wide), strict=True
    ):
        assert_as_good(ours, theirs, true)
    assert norm(found[0].double()) > 0


@pytest.mark.parametrize("at", range(4))
def test_what_is_not_wanted_is_empty(at):
    grad, (x, a, b, _, _, ids) = problem(SIZES[6], True)
    mask = [n == at for n in range(4)]
    some = low_rank_backward(grad, x, a, b, ids, mask)
    every = low_rank_backward(grad, x, a, b, ids, [True] * 4)
    for part, whole, wanted in zip(some, every, mask, strict=True):
        assert torch.equal(part, whole if wanted else x.new_empty(0))


def test_a_gradient_of_rows_alone_reads_only_their_tasks():
    """One row of 2,000 tasks, whose factors are 16 MB."""
    x, a, b = torch.randn(1, 128), torch.randn(2000, 8, 128), torch.randn(2000, 128, 8)

    ids, alone = torch.tensor([7]), [True, False, False, False]

    def least(op, *args):
        return min(timeit.repeat(partial(op, *args), number=1, repeat=5))

    there, back = (x, a, b, None, None, ids), (x, x, a, b, ids, alone)
    assert least(low_rank_backward, *back) < 10 * least(low_rank, *there)


def test_rows_that_all_tasks_share_and_one_init_for_all():
    grad, (x, a, b, bias, init, _) = problem(SIZES[3], False)
    x, init = x[:1].expand_as(x), init[:1].expand_as(init)
    close(by_ops(grad, (x, a, b, bias, init, None)), specified(grad, (x, a, b, bias, init, None)))


def test_a_result_does_not_depend_on_the_number_of_threads():
    grad, args = problem((7, 150, 70, 90, 5), True)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(by_ops(grad, args))
    torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


def test_fake_kernels_and_schemas():
    grad, args = problem(SIZES[3], True)
    checks = "test_schema", "test_faketensor"
    torch.library.opcheck(low_rank, args, test_utils=checks)
    x, a, b, bias, init, ids = args
    torch.library.opcheck(add_low_rank_, (init, x, a, b, bias, ids), test_utils=checks)
    for mask in ([True] * 4, [False, True, False, True]):
        torch.library.opcheck(low_rank_backward, (grad, x, a, b, ids, mask), test_utils=checks)


X, A, B = torch.randn(4, 5), torch.randn(3, 2, 5), torch.randn(3, 6, 2)
IDS = torch.tensor([0, 2, 2, 1])
BAD = {
    "rank of a": (r"a must have shape \(B, rank, in\)", {"a": A[0]}),
    "rank of b": (r"b must have shape \(B, out, rank\)", {"b": B[0]}),
    "rank of x": (r"x must have shape \(R, columns\)", {"x": X[None]}),
    "columns": (r"x.size\(-1\) must be 5 \(in", {"x": X[:, 1:]}),
    "tasks": (r"b.size\(0\) must be 3 \(the tasks of a", {"b": B[1:]}),
    "rank": (r"b.size\(2\) must be 2 \(the rank of a", {"b": B[..., 1:]}),
    "dtype of a": ("a must have the dtype of x", {"a": A.double()}),
    "half": ("x must have dtype float64 or float32, got float16", {"x": X.half()}),
    "outputs of bias": (r"bias.size\(1\) must be 6", {"bias": torch.randn(3, 5)}),
    "rows of init": ("init must have as many rows as x", {"init": torch.randn(3, 6)}),
    "outputs of init": (r"init.size\(-1\) must be 6", {"init": torch.randn(4, 5)}),
    "dtype of init": ("init must have the dtype of x", {"init": torch.randn(4, 6).double()}),
    "ids": (r"task_ids.size\(0\) must be 4", {"ids": IDS[1:]}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    """No read beyond what was given is possible."""
    message, changed = BAD[name]
    given = {"x": X, "a": A, "b": B, "bias": None, "init": None, "ids": IDS} | changed
    with pytest.raises(ValueError, match=message):
        low_rank(*given.values())


def test_bad_input_of_what_is_added_to():
    y = torch.zeros(4, 6)
    for bad, message in (
        (y[1:], "y must have as many rows as x"),
        (y[:, 1:], r"y.size\(-1\) must be 6"),
        (y.double(), "y must have the dtype of x"),
        (y[:1].expand(4, 6), "y must be contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            add_low_rank_(bad, X, A, B, None, IDS)
    with pytest.raises(IndexError, match=r"task_ids must be in \[0, 3\), got 3"):
        add_low_rank_(y, X, A, B, None, IDS + 1)
    assert not y.any()


def test_bad_input_of_the_way_back():
    grad = torch.randn(4, 6)
    for bad in (grad[1:], grad[:, 1:], grad.double()):
        with pytest.raises(ValueError, match="grad"):
            low_rank_backward(bad, X, A, B, IDS, [True] * 4)
    with pytest.raises(ValueError, match="output_mask must have 4 entries, got 3"):
        low_rank_backward(grad, X, A, B, IDS, [True] * 3)
    with pytest.raises(IndexError, match=r"task_ids must be in \[0, 3\), got 3"):
        low_rank_backward(grad, X, A, B, IDS + 1, [True] * 4)


class Doubled(nn.Linear):
    """A base that is more than a product."""

    def forward(self, x):
        return 2 * super().forward(x)


class OfAllColumns(nn.Linear):
    """A base whose result has fewer columns than the layer."""

    def forward(self, x):
        return super().forward(x).sum(-1, keepdim=True)


class Twofold(nn.Linear):
    """A base whose result has more dimensions than the layer's."""

    def forward(self, x):
        y = super().forward(x)
        return torch.stack([y, -y])


class Rounded(nn.Linear):
    """A base of another dtype."""

    def forward(self, x):
        return super().forward(x).float()


@pytest.mark.parametrize("kind", [OfAllColumns, Twofold, Rounded])
@pytest.mark.parametrize("shape", [(12, 7), (5, 7), (5, 3, 7), (1, 3, 7)], ids=str)
def test_what_a_base_returns_is_broadcast(shape, kind):
    layer = TaskLinear(5, 7, 6, rank=3, base=kind(7, 6).double(), dtype=torch.float64)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x, ids = draw(*shape), torch.arange(12) % 5 if shape == (12, 7) else None
    with use_backend("reference"):
        wanted = layer(x, ids)
    close(layer(x, ids), wanted)


@pytest.mark.parametrize(
    ("error", "message", "given"),
    [
        (
            ValueError,
            r"x must have shape \(R, 7\) when task_ids is given",
            ((12, 6), 5, torch.int64),
        ),
        (TypeError, "task_ids must have dtype torch.int64", ((12, 7), 5, torch.int32)),
        (ValueError, r"task_ids must have shape \(11,\)", ((11, 7), 5, torch.int64)),
        (IndexError, r"task_ids must be in \[0, 5\), got 5", ((12, 7), 6, torch.int64)),
    ],
)
def test_bad_input_of_a_layer(error, message, given):
    shape, tasks, dtype = given
    layer, ids = TaskLinear(5, 7, 6, rank=3, base=True), torch.arange(12, dtype=dtype) % tasks
    with pytest.raises(error, match=message):
        layer(torch.randn(shape), ids)


def layer_by_hand(layer, x, ids):
    """The same from ops that know every transform."""
    y = reference.low_rank(x, layer.weight_a, layer.weight_b, layer.bias, None, ids)
    return y if layer.base is None else y + layer.base(x)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("base", [None, nn.Linear, Doubled])
@pytest.mark.parametrize("shape", [(12, 7), (5, 7), (5, 3, 7), (1, 3, 7)], ids=str)
def test_a_layer_and_its_second_derivatives(shape, base, frozen):
    made = None if base is None else base(7, 6).double().requires_grad_(not frozen)
    layer = TaskLinear(5, 7, 6, rank=3, base=made, dtype=torch.float64)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = draw(*shape, grad=True)
    ids = torch.arange(12) % 4 if shape == (12, 7) else None
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def derivatives(f):
        y = f()
        first = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
        total = sum(g.sin().sum() for g in first)
        return [y, *first, *torch.autograd.grad(total, leaves)]

    def by_hand():
        rows = x.unsqueeze(1) if ids is None and x.ndim == 2 else x
        y = layer_by_hand(layer, rows.expand(5, -1, -1) if ids is None else rows, ids)
        return y.squeeze(1) if ids is None and x.ndim == 2 else y

    close(derivatives(lambda: layer(x, ids)), derivatives(by_hand))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is dep:DeprecationWarning")
def test_a_layer_under_transforms_and_autocast():
    layer = TaskLinear(5, 7, 6, rank=3, base=True, dtype=torch.float64)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x, ids = draw(12, 7), torch.arange(12) % 5
    close(
        torch.vmap(lambda x: layer(x, ids))(torch.stack([x, 2 * x])),
        torch.stack([layer(x, ids), layer(2 * x, ids)]),
    )
    close(
        torch.func.jvp(lambda x: layer(x, ids), (x,), (x,))[1],
        torch.autograd.functional.jvp(lambda x: layer_by_hand(layer, x, ids), x, x)[1],
    )
    with torch.no_grad(), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x), ids)).tangent
    close(tangent, torch.autograd.functional.jvp(lambda x: layer_by_hand(layer, x, ids), x, x)[1])
    with torch.autocast("cpu", torch.bfloat16):
        y = layer.float()(x.float(), ids)
    assert y.dtype == torch.bfloat16


class Kept(nn.Linear):
    """A base that returns the same tensor again and again."""

    def forward(self, x):
        if not hasattr(self, "kept"):
            self.kept = super().forward(x)
        return self.kept


@pytest.mark.parametrize("grad", [False, True])
def test_only_what_nobody_holds_is_written_over(grad):
    x, ids, seen = torch.randn(12, 7), torch.arange(12) % 5, []
    bases = [Kept(7, 6), nn.Linear(7, 6)]
    bases[1].register_forward_hook(lambda module, x, y: seen.append(y))
    for base in bases:
        layer = TaskLinear(5, 7, 6, rank=3, base=base)
        with torch.set_grad_enabled(grad):
            nn.init.normal_(layer.weight_b.data)
            wanted = base(x) + reference.low_rank(
                x, layer.weight_a, layer.weight_b, layer.bias, None, ids
            )
            for _ in range(2):
                torch.testing.assert_close(layer(x, ids), wanted)
    assert len(seen) == 3
    assert torch.equal(seen[0], seen[2])


def test_a_trace_of_a_layer_holds_ops_that_know_their_derivatives():
    layer, ids = TaskLinear(5, 7, 6, rank=3, base=True), torch.arange(12) % 5
    x, other = draw(12, 7).float(), draw(12, 7, grad=True).float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch.jit is deprecated
        traced = torch.jit.trace(layer, (x, ids))
    close(traced(other, ids), layer(other, ids), 1e-6)
    assert "PythonOp" not in str(traced.graph)
    of = [torch.autograd.grad(f(other, ids).sum(), other)[0] for f in (traced, layer)]
    close(*of, 1e-6)


@pytest.mark.parametrize(
    "wanted", [(), ("a",), ("x", "b", "bias"), ("x", "a", "b", "bias")], ids=str
)
def test_flops_of_what_is_wanted(wanted):
    """12 rows of 7 inputs and 6 outputs at a rank of 3, both ways."""
    layer, x = TaskLinear(5, 7, 6, rank=3), torch.randn(12, 7, requires_grad="x" in wanted)
    layer.weight_a.requires_grad_("a" in wanted)
    layer.weight_b.requires_grad_("b" in wanted)
    layer.bias.requires_grad_("bias" in wanted)
    with FlopCounterMode(display=False) as counter:
        y = layer(x, torch.arange(12) % 5)
        if wanted:
            y.sum().backward()
    there = 7 + 6
    back = 6 + 7 * ("x" in wanted) + 7 * ("a" in wanted) + (7 + 6) * ("b" in wanted)
    assert counter.get_total_flops() == 2 * 12 * 3 * (there + (back if wanted else 0))


def test_one_op_each_way():
    layer = TaskLinear(5, 7, 6, rank=3, base=True)
    x, ids = torch.randn(12, 7), torch.arange(12) % 5

    def names(call):
        with torch.profiler.profile() as profile:
            call()
        return [e.name for e in profile.events() if e.name.startswith("hyperfast::")]

    added = "hyperfast::add_low_rank_"
    with torch.no_grad():
        assert names(lambda: layer(x, ids)) == [added]
    assert names(lambda: layer(x, ids).sum().backward()) == [added, "hyperfast::low_rank_backward"]
    # In a view it would be a node of autograd for all that it is a view of.
    assert names(lambda: layer(x[:5])) == ["hyperfast::low_rank"]
