"""The C++ kernels against float64 references, within a bound that their arithmetic must meet."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from hyperfast.kernels import reference
from hyperfast.layout import TRANSFORMS, Generated
from hyperfast.plans.cpu import EXTENSION, EXTENSION_ERROR
from hyperfast.plans.sizes import PLANS
from tests.support import flat
from tests.support.budget import assert_as_good, assert_within_roundings, norm
from tests.support.draw import draw

if EXTENSION is None:
    pytest.skip(EXTENSION_ERROR, allow_module_level=True)

op = torch.ops.hyperfast
pytestmark = pytest.mark.usefixtures("nan_poison")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


rand = partial(draw, seed=0)


def strided(t, how):
    """The same values under other strides."""
    if how == "transposed":
        return t.mT.contiguous().mT
    if how == "gaps":
        return torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]
    if how == "outer gaps":
        return torch.cat([t, torch.full_like(t, torch.nan)], -1)[..., : t.shape[-1]]
    return t


def mix(rows, tasks, seed=0):
    """Shuffled ids of ``rows`` rows a task, and where each task's rows went."""
    ids = torch.arange(tasks).repeat_interleave(rows)
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]
    return ids, torch.argsort(ids, stable=True)


def unsort(t, where):
    """``(B, N, C)`` to rows ``(R, C)`` such that row ``where[n]`` is the n-th."""
    flat = t.flatten(0, 1)
    return torch.empty_like(flat).index_copy(0, where, flat)


def linear(x, w, b):
    return torch.einsum("boi,bni->bno", w, x) + b[:, None]


def outer(g, x):
    return torch.einsum("bno,bni->boi", g, x)


SIZES = [  # B, N, in, out
    (1, 1, 1, 1),
    (3, 2, 17, 63),
    (2, 3, 64, 65),
    (5, 7, 129, 3),
    (2, 63, 65, 10),
    (2, 65, 1, 129),
    (1, 600, 3, 70),
    (40, 1, 64, 10),
    (0, 3, 4, 5),
    (3, 0, 4, 5),
    (3, 2, 0, 5),
    (3, 2, 4, 0),
]


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_results_are_rounded_as_pytorch_rounds_them(dtype):
    """To nearest, ties to even; sums of any two numbers, infinities, NaN and subnormal ones too."""
    draw_bits = torch.Generator().manual_seed(0)
    bits = torch.randint(-(1 << 15), 1 << 15, (40, 1001, 2), generator=draw_bits)
    bits[:, :100] %= 1 << 7  # subnormal in both
    weight = bits.to(torch.int16).view(dtype)
    y = op.task_linear(torch.ones(40, 3, 2, dtype=dtype), weight, None, None)
    want = (weight[..., 0].float() + weight[..., 1].float()).to(dtype)
    assert want.isnan().any()
    assert ((want != 0) & (want.abs() < torch.finfo(dtype).smallest_normal)).any()
    torch.testing.assert_close(y, want.unsqueeze(1).expand_as(y), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("how", ["plain", "transposed", "gaps", "outer gaps"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestTaskValues:
    def test_batched(self, dtype, size, how):
        b, n, i, o = size
        x, g = rand(b, n, i, dtype=dtype), rand(b, n, o, dtype=dtype, seed=1)
        w, bias = rand(b, o, i, dtype=dtype, seed=2), rand(b, o, dtype=dtype, seed=3)
        y = op.task_linear(strided(x, how), strided(w, how), strided(bias, how), None)
        assert_within_roundings(y, linear, x, w, bias, depth=i)
        gw = op.task_linear_grad_weight(strided(g, how), strided(x, how), None, b)
        assert_within_roundings(gw, outer, g, x, depth=n)

    def test_ragged(self, dtype, size, how):
        b, n, i, o = size
        x, g = rand(b, n, i, dtype=dtype), rand(b, n, o, dtype=dtype, seed=1)
        w, bias = rand(b, o, i, dtype=dtype, seed=2), rand(b, o, dtype=dtype, seed=3)
        ids, where = mix(n, b)
        rows, grads = unsort(x, where), unsort(g, where)
        y = op.task_linear(strided(rows, how), strided(w, how), bias, ids)
        assert_within_roundings(y[where].view(b, n, o), linear, x, w, bias, depth=i)
        gw = op.task_linear_grad_weight(strided(grads, how), strided(rows, how), ids, b)
        assert_within_roundings(gw, outer, g, x, depth=n)


HYPER_SIZES = [  # B, N, in, out, features
    (1, 1, 64, 64, 64),
    (5, 3, 7, 9, 4),
    (70, 1, 65, 63, 33),
    (50, 2, 129, 66, 17),
    (100, 8, 17, 3, 16),
    (17, 64, 63, 1, 3),
    (12, 9, 1, 1, 1),
    (3, 2100, 2, 18, 20),
    (13, 3, 300, 70, 5),
    (3, 2, 5000, 1, 3),
    (7, 2, 3, 4, 200),
    (130, 2, 40, 30, 64),  # from here to 1500 tasks, so many that a matrix unit pays
    (390, 1, 33, 11, 33),
    (400, 8, 12, 13, 100),
    (512, 8, 65, 63, 97),
    (700, 1, 1, 99, 32),
    (1500, 1, 8, 13, 200),
    (1500, 1, 20, 17, 200),  # several stretches of parameters
    (500, 1, 33, 20, 200),  # and of tasks
    (400, 3, 64, 7, 33),
    (70, 3, 32, 9, 33),
    (100, 1, 65, 64, 64),
    (100, 16, 64, 33, 97),
    (9, 33, 67, 130, 17),  # several slices of an odd number of inputs
    (400, 0, 12, 13, 40),
    (400, 2, 0, 999, 40),
    (0, 3, 4, 5, 6),
    (3, 0, 4, 5, 6),
    (3, 2, 0, 5, 6),
    (3, 2, 4, 5, 0),
]


@pytest.mark.parametrize(
    ("plan", "ragged", "target_bias", "head_bias"),
    [
        ("contract", False, True, True),
        ("contract", True, False, False),
        ("tile", False, True, True),
        ("tile", True, True, False),
        ("materialize", False, False, True),
        ("materialize", True, True, True),
    ],
)
@pytest.mark.parametrize("size", HYPER_SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hyper_values(dtype, size, plan, ragged, target_bias, head_bias):
    b, n, i, o, k = size
    x, g = rand(b, n, i, dtype=dtype), rand(b, n, o, dtype=dtype, seed=1)
    h, v = rand(b, k, dtype=dtype, seed=2), rand(o * (i + target_bias), k, dtype=dtype, seed=3)
    v0 = rand(len(v), dtype=dtype, seed=4) if head_bias else None
    how = ["plain", "transposed", "gaps", "outer gaps"][(b + k + ragged) % 4]
    ids, where, xs, gs = None, None, x, g
    if ragged:
        ids, where = mix(n, b)
        xs, gs = unsort(x, where), unsort(g, where)
    xs, gs, hs, vs = (strided(t, how) for t in (xs, gs, h, v))
    m = o * i

    def sort(rows):
        return rows[where].view(b, n, rows.shape[-1]) if ragged else rows

    def generated(h, v, v0):
        return h @ v.mT + v0

    def forward(x, h, v, v0):
        p = generated(h, v, v0)
        y = torch.einsum("boi,bni->bno", p[:, :m].view(b, o, i), x)
        return y + p[:, None, m:] if target_bias else y

    def grad_x(g, h, v, v0):
        return torch.einsum("boi,bno->bni", generated(h, v, v0).view(b, o, i), g)

    def grad_flat(g, x):
        w = outer(g, x).flatten(1)
        return torch.cat([w, g.sum(1)], 1) if target_bias else w

    zero = torch.zeros(len(v), dtype=dtype) if v0 is None else v0
    if i + target_bias == 0:  # a head without rows does not say how many outputs there are
        y = op.hyper_linear(xs, hs, vs.view(o, 0, k), None, None, None, ids, "", plan)
        assert y.shape == gs.shape
        assert not y.any()
        return
    y = flat.hyper_linear(xs, hs, vs, v0, ids, target_bias, plan)
    assert_within_roundings(sort(y), forward, x, h, v, zero, depth=i + k + 2)
    shared = None if v0 is None else v0[:m]
    if o:
        gx = flat.grad_x(gs, hs, vs[:m], shared, ids, plan)
        args = (g, h, v[:m], zero[:m])
        assert_within_roundings(sort(gx), grad_x, *args, depth=o + k + 2)
    gh = flat.grad_h(gs, xs, vs, ids, b, target_bias, plan)
    assert_within_roundings(gh, lambda g, x, v: grad_flat(g, x) @ v, g, x, v, depth=n + len(v))
    gv = op.hyper_linear_grad_weight(gs, xs, hs, ids, target_bias, plan)
    assert_within_roundings(gv, lambda g, x, h: grad_flat(g, x).mT @ h, g, x, h, depth=n + b)
    gh, gv, gb = flat.backward(gs, xs, hs, vs, v0, ids, target_bias, "", plan)
    assert_within_roundings(gh, lambda g, x, v: grad_flat(g, x) @ v, g, x, v, depth=n + len(v))
    assert_within_roundings(gv, lambda g, x, h: grad_flat(g, x).mT @ h, g, x, h, depth=n + b)
    assert_within_roundings(gb, lambda g, x: grad_flat(g, x).sum(0), g, x, depth=n * b)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("how", ["plain", "transposed", "gaps", "expanded"])
@pytest.mark.parametrize("features", [1, 2, 7, 32, 33])
@pytest.mark.parametrize("tasks", [1, 3, 63, 65])
def test_pairs_of_a_head_begin_anywhere(tasks, features, how, plan):
    """Rows of bf16 begin at odd addresses, an odd number of elements apart, and NaN lies between
    them; features in any way."""
    dtype, i, o = torch.bfloat16, 8, 9
    row = features + 1 + features % 2
    storage = torch.full((1 + o * (i + 1) * row,), torch.nan, dtype=dtype)
    v = storage[1:].view(-1, row)[:, :features]
    v.copy_(rand(*v.shape, dtype=dtype, seed=3))
    h = rand(tasks, features, dtype=dtype, seed=2)
    h = h[:1].expand(tasks, features) if how == "expanded" else strided(h, how)
    x, v0 = rand(tasks, 2, i, dtype=dtype), rand(len(v), dtype=dtype, seed=4)
    y = flat.hyper_linear(x, h, v, v0, None, True, plan)

    def forward(x, h, v, v0):
        p = h @ v.mT + v0
        return torch.einsum("boi,bni->bno", p[:, : o * i].view(-1, o, i), x) + p[:, None, o * i :]

    assert_within_roundings(y, forward, x, h, v, v0, depth=i + features + 2)
    ids = torch.arange(tasks).repeat_interleave(2)
    ragged = flat.hyper_linear(x.flatten(0, 1), h, v, v0, ids, True, plan)
    assert_within_roundings(ragged.view_as(y), forward, x, h, v, v0, depth=i + features + 2)
    turned = flat.grad_x(y, h, v[: o * i], v0[: o * i], None, plan)

    def backward(y, h, v, v0):
        return torch.einsum("boi,bno->bni", (h @ v.mT + v0).view(-1, o, i), y)

    assert_within_roundings(turned, backward, y, h, v[: o * i], v0[: o * i], depth=o + features + 2)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("ragged", [False, True], ids=["batched", "ragged"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("size", [(50, 2, 17, 66, 9), (100, 8, 17, 3, 16), (3, 300, 63, 40, 3)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hyper_transforms(dtype, size, transform, ragged, plan):
    b, n, i, o, k = size
    x, g = rand(b, n, i, dtype=dtype), rand(b, n, o, dtype=dtype, seed=1)
    h, v = rand(b, k, dtype=dtype, seed=2), rand(o * (i + 1), k, dtype=dtype, seed=3, scale=0.2)
    v0, ids = rand(len(v), dtype=dtype, seed=4), None
    if ragged:
        ids, where = mix(n, b)
        x, g = unsort(x, where), unsort(g, where)

    def run(*args):
        x, g, h, v, v0 = args
        made = Generated.of_head(v, v0, i, True)
        turned = reference.hyper_linear(g, h, *made.transposed, ids, transform)
        y = reference.hyper_linear(x, h, *made, ids, transform)
        grads = reference.hyper_linear_backward(g, x, h, *made[:3], ids, transform, [True] * 3)
        return y, turned, *grads

    args = x, g, h, v, v0
    made = Generated.of_head(v, v0, i, True)
    results = (
        op.hyper_linear(x, h, *made, ids, transform, plan),
        op.hyper_linear(g, h, *made.transposed, ids, transform, plan),
        *flat.backward(g, x, h, v, v0, ids, True, transform, plan),
    )
    exact, plain = run(*(t.double() for t in args)), run(*args)
    for result, one, other in zip(results, plain, exact, strict=True):
        assert_as_good(result, one, other, size=norm)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_over_the_whole_range(transform, plan):
    edges = [0.0, -0.0, 20, 20.5, 88.7, 89, 105, -87, -100, -103, -120, 1e-30, torch.inf, torch.nan]
    w = torch.cat([torch.tensor(edges), torch.linspace(-110, 90, 3001)])
    w, one, by = torch.cat([w, -w]).unsqueeze(1), torch.ones(1, 1, 1), TRANSFORMS[transform]
    rows = torch.ones(len(w), 1, 1)
    y = op.hyper_linear(rows, w, one, None, None, None, None, transform, plan).view(-1)
    slope = op.hyper_linear_backward(
        rows, rows, w, one, None, None, None, transform, [True, False, False], plan
    )[0].view(-1)
    w = w.view(-1).double()
    for got, exact in ((y, by.value(w)), (slope, by.slope(w))):
        rounded = exact.float().double()
        same = (got.double() == rounded) | (got.isnan() & w.isnan())
        error = (got.double() - exact).abs() <= 4 * 2.0**-24 * exact.abs() + 2.0**-126
        assert bool((same | error).all()), w[~(same | error)]


@pytest.mark.parametrize("plan", PLANS)
def test_a_long_sum_is_no_less_exact_than_a_matrix_product(plan):
    """The gradient of h is a sum over 16,512 parameters: one after another they came to 2e-6."""
    x, g = rand(64, 1, 128, dtype=torch.float32), rand(64, 1, 128, dtype=torch.float32, seed=1)
    v = rand(128 * 129, 40, dtype=torch.float32, seed=2)
    exact = torch.cat([outer(g.double(), x.double()).flatten(1), g[:, 0].double()], 1) @ v.double()
    error = flat.grad_h(g, x, v, None, 64, True, plan).double() - exact
    assert error.norm() < 8 * 2.0**-24 * exact.norm()


@pytest.mark.parametrize("tasks", [2, 30])
def test_hyper_plans_by_any_name(tasks):
    f32 = torch.float32
    x, h, v = rand(tasks, 2, 5, dtype=f32), rand(tasks, 3, dtype=f32), rand(24, 3, dtype=f32)
    plans = ["", *PLANS]
    tile, *others = [flat.hyper_linear(x, h, v, None, None, True, plan) for plan in plans]
    for other in others:
        torch.testing.assert_close(other, tile)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hyper_stride_zero(dtype):
    x, g = rand(1, dtype=dtype).expand(20, 3, 17), rand(17, dtype=dtype).expand(20, 3, 17)
    h, v = rand(1, dtype=dtype).expand(20, 5), rand(1, 5, dtype=dtype).expand(17 * 18, 5)

    def of_weights(g, x):
        return torch.cat([outer(g, x).flatten(1), g.sum(1)], 1)

    gv = op.hyper_linear_grad_weight(g, x, h, None, True, "")
    assert_within_roundings(gv, lambda g, x, h: of_weights(g, x).mT @ h, g, x, h, depth=60)
    gh = flat.grad_h(g, x, v, None, 20, True, "")
    assert_within_roundings(gh, lambda g, x, v: of_weights(g, x) @ v, g, x, v, depth=400)
    gx = flat.grad_x(g, h, v[: 17 * 17], None, None, "")
    same = lambda g, h, v: torch.einsum("boi,bno->bni", (h @ v.mT).view(20, 17, 17), g)  # noqa: E731
    assert_within_roundings(gx, same, g, h, v[: 17 * 17], depth=30)


def test_hyper_memory_does_not_grow_with_the_generated_weights():
    """64 MB of weights are generated; nothing near that may be allocated."""
    code = (
        "import resource, torch\n"
        "from tests.support import flat\n"
        "op = torch.ops.hyperfast\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "x, h, v = torch.ones(1024, 1, 128), torch.ones(1024, 8), torch.ones(128 * 129, 8)\n"
        "run = lambda n: [(flat.hyper_linear(x[:n], h[:n], v, None, None, True, plan),\n"
        "  flat.grad_h(x[:n], x[:n], v, None, n, True, plan),\n"
        "  op.hyper_linear_grad_weight(x[:n], x[:n], h[:n], None, True, plan))\n"
        "  for plan in ('contract', 'tile')] and None\n"
        "run(64); before = peak(); run(1024); print(peak() - before)\n"
    )
    done = run(EXTENSION.isa(), "-c", code)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 8 * 1024  # KiB


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestTaskStrideZero:
    def test_expanded(self, dtype):
        one = rand(1, dtype=dtype)
        x, w = one.expand(4, 5, 33), rand(1, 7, 33, dtype=dtype).expand(4, 7, 33)
        bias = one.expand(4, 7)
        y = op.task_linear(x, w, bias, None)
        assert_within_roundings(y, linear, x, w, bias, depth=33)
        gw = op.task_linear_grad_weight(one.expand(4, 5, 70), x, None, 4)
        assert_within_roundings(gw, outer, one.expand(4, 5, 70), x, depth=5)

    def test_tasks_without_rows(self, dtype):
        x, g = rand(3, 20, dtype=dtype), rand(3, 6, dtype=dtype)
        ids = torch.tensor([4, 1, 4])
        gw = op.task_linear_grad_weight(g, x, ids, 6)
        assert_within_roundings(gw[1], lambda g, x: g[1, :, None] * x[1], g, x, depth=1)
        both = lambda g, x: g[0, :, None] * x[0] + g[2, :, None] * x[2]  # noqa: E731
        assert_within_roundings(gw[4], both, g, x, depth=2)
        assert not gw[[0, 2, 3, 5]].any()


def test_fp16_and_bf16_keep_infinity_nan_and_subnormals():
    for dtype in (torch.float16, torch.bfloat16):
        tiny = torch.finfo(dtype).smallest_normal / 4
        values = torch.tensor([torch.inf, -torch.inf, torch.nan, tiny, -tiny, 3.0], dtype=dtype)
        y = op.task_linear(values.view(1, 6, 1), torch.ones(1, 1, 1, dtype=dtype), None, None)
        torch.testing.assert_close(y.flatten(), values, rtol=0, atol=0, equal_nan=True)
    y = op.task_linear(*[torch.full((1, 1, 1), 300.0, dtype=torch.float16)] * 2, None, None)
    assert y.isinf().all()


@pytest.mark.parametrize("plan", PLANS)
def test_result_does_not_depend_on_threads(plan):
    x, w = rand(9, 700, 65, dtype=torch.float32), rand(9, 33, 65, dtype=torch.float32)
    g, h = rand(9, 700, 33, dtype=torch.float32), rand(9, 40, dtype=torch.float32)
    v = rand(33 * 65, 40, dtype=torch.float32)
    before = torch.get_num_threads()
    results = []
    v0 = rand(len(v), dtype=torch.float32, seed=5)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y, gw = op.task_linear(x, w, None, None), op.task_linear_grad_weight(g, x, None, 9)
        hyper = flat.hyper_linear(x, h, v, None, None, False, plan)
        gx = flat.grad_x(g, h, v, None, None, plan)
        gh = flat.grad_h(g, x, v, None, 9, False, plan)
        gv = op.hyper_linear_grad_weight(g, x, h, None, False, plan)
        both = [flat.backward(g, x, h, v, v0, None, False, f, plan) for f in ("", "softplus")]
        results.append((y, gw, hyper, gx, gh, gv, *both[0], *both[1]))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


X, W, BIAS = torch.zeros(2, 3, 4), torch.zeros(2, 5, 4), torch.zeros(2, 5)
IDS, H, V = torch.tensor([0, 1, 0]), torch.zeros(2, 3), torch.zeros(25, 3)
M, REST = torch.zeros(5, 4, 3), (None, None, None, None, "", "")
AUTO = ("", "")
BAD = [
    (op.task_linear, (X[0], W, None, None), r"x must have shape \(B, N"),
    (op.task_linear, (X.sum(), W, None, None), r"x must .*got \(\)"),
    (op.task_linear, (X, W[0], None, None), r"weight must have shape"),
    (op.task_linear, (X[..., :3], W, None, None), r"x.size\(-1\) must be 4"),
    (op.task_linear, (X[:1], W, None, None), r"x.size\(0\) must be 2"),
    (op.task_linear, (X, W, BIAS[:1], None), r"bias.size\(0\)"),
    (op.task_linear, (X, W, BIAS[:, :1], None), r"bias.size\(1\)"),
    (op.task_linear, (X, W, BIAS[0], None), r"bias must have shape"),
    (op.task_linear, (X.double(), W, None, None), r"dtype of x, float64"),
    (op.task_linear, (X.long(), W.long(), None, None), r"got int64"),
    (op.task_linear, (X[0], W, None, IDS.int()), r"task_ids must .* got int32"),
    (op.task_linear, (X[0], W, None, IDS[:2]), r"task_ids.size\(0\) must be 3"),
    (op.task_linear, (X[0], W, None, IDS[None]), r"task_ids must have shape"),
    (op.task_linear, (X, W, None, IDS), r"x must have shape \(R, columns\)"),
    (op.task_linear_grad_weight, (X[:, :2], X, None, 2), r"grad must have as many rows"),
    (op.task_linear_grad_weight, (X, X, None, 3), r"x.size\(0\) must be 3"),
    (op.task_linear_grad_weight, (X, X, None, -1), r"tasks must not be negative"),
    (op.hyper_linear, (X, H, V[:5], *REST), r"matrix must have shape"),
    (op.hyper_linear, (X, H, M[..., :2], *REST), r"matrix.size\(2\) must be 3"),
    (op.hyper_linear, (X, H, M[:, :3], *REST), r"matrix.size\(1\) must be 4"),
    (op.hyper_linear, (X, H[0], M, *REST), r"h must have shape"),
    (op.hyper_linear, (X, H[:1], M, *REST), r"x.size\(0\) must be 1"),
    (op.hyper_linear, (X, H, M, M[0], *REST[1:]), r"matrix_bias.size\(0\) must be 5"),
    (op.hyper_linear, (X, H, M, M[:, :3, 0], *REST[1:]), r"matrix_bias.size\(1\) must be 4"),
    (op.hyper_linear, (X, H, M, None, M[:4, 0], None, None, *AUTO), r"vector.size\(0\) must be 5"),
    (
        op.hyper_linear,
        (X, H, M, None, M[:, 0, :2], None, None, *AUTO),
        r"vector.size\(1\) must be 3",
    ),
    (op.hyper_linear, (X, H, M, None, None, M[:4, 0, 0], None, *AUTO), r"vector_bias.size\(0\)"),
    (op.hyper_linear, (X, H, M, None, None, M[0], None, *AUTO), r"vector_bias must have shape"),
    (op.hyper_linear, (X, H.double(), M, *REST), r"h must have the dtype of x"),
    (op.hyper_linear, (X, H, M.double(), *REST), r"matrix must have the dtype of x"),
    (op.hyper_linear, (X, H, M, *REST[:-1], "best"), r'plan must be .* got "best"'),
    (op.hyper_linear_grad_h, (X, X, M, None, None, 2, ""), r"matrix.size\(0\) must be 4"),
    (op.hyper_linear_grad_h, (X, X, M[:4], M[:, 0], None, 2, ""), r"vector.size\(0\) must be 4"),
    (op.hyper_linear_grad_h, (X, X, M[:4], None, None, -2, ""), r"tasks must not be negative"),
    (op.hyper_linear_grad_h, (X[0], X, M[:4], None, None, 2, ""), r"grad must have as many rows"),
    (op.hyper_linear_grad_weight, (X, X, H[:1], None, True, ""), r"x.size\(0\) must be 1"),
]


@pytest.mark.parametrize(("call", "args", "message"), BAD)
def test_bad_arguments(call, args, message):
    with pytest.raises(ValueError, match=message):
        call(*args)


@pytest.mark.parametrize("bad", [-1, 2, 2**40])
def test_task_ids_out_of_range(bad):
    ids = torch.tensor([0, bad, 1])
    with pytest.raises(IndexError, match=rf"task_ids must be in \[0, 2\), got {bad}"):
        op.task_linear(X[0], W, None, ids)
    with pytest.raises(IndexError, match=rf"task_ids must be in \[0, 2\), got {bad}"):
        op.task_linear_grad_weight(X[0], X[0], ids, 2)
    with pytest.raises(IndexError, match=rf"task_ids must be in \[0, 2\), got {bad}"):
        op.hyper_linear(X[0], H, M, None, None, None, ids, "", "")


def run(isa, *command):
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "HYPERFAST_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("isa", EXTENSION.isas())
@pytest.mark.skipif("HYPERFAST_ISA" in os.environ, reason="this is such a run")
def test_every_instruction_set(isa):
    which = run(isa, "-c", "import torch, hyperfast._C as c; print(c.isa())")
    assert which.stdout.strip() == isa, which.stderr
    if isa == EXTENSION.isa():
        return  # the tests above ran it
    # Without the case that takes portable code minutes: others, too, have several blocks of tasks.
    selection = "not bad and not 512"
    if isa == "amx_emulated":  # what a matrix unit does; the rest is that of avx512
        selection += " and test_hyper_values and contract and not float64"
    done = run(isa, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", selection)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_unknown_instruction_set():
    done = run("sse9", "-c", "import torch, hyperfast._C as c; c.isa()")
    assert "HYPERFAST_ISA must be one of" in done.stderr
    assert done.returncode != 0
