"""The ops that run all steps of a HyperLSTM, against its equations differentiated by autograd."""

from typing import NamedTuple

import pytest
import torch

from hyperfast import use_backend
from hyperfast.nets.hyper_lstm_steps import State, Weights
from hyperfast.nets.hyper_lstm_unroll import Unrolled, run
from hyperfast.ops import hyper_lstm, hyper_lstm_backward
from hyperfast.ops.hyper_lstm import MATRICES
from hyperfast.plans.cpu import EXTENSION, EXTENSION_ERROR
from tests.support.budget import assert_as_good, close, norm
from tests.support.draw import draw

pytestmark = pytest.mark.skipif(EXTENSION is None, reason=EXTENSION_ERROR or "built")


class Case(NamedTuple):
    ins: int
    hidden: int
    hyper: int
    n_z: int
    sizes: list[int]


CASES = {
    "1": Case(1, 1, 1, 1, [1]),
    "3": Case(3, 3, 3, 3, [3, 3, 3]),
    "63": Case(63, 63, 63, 3, [63, 63]),
    "lanes": Case(16, 64, 16, 16, [12] * 3),
    "packed": Case(5, 67, 18, 5, [37, 36, 36, 2, 1]),
    "chunks": Case(4, 130, 9, 2, [131, 131]),
    "packed chunks": Case(9, 20, 33, 7, [150, 70, 33, 33, 32]),
    "one sequence": Case(3, 7, 5, 2, [1] * 40),
    "ends before": Case(3, 4, 2, 2, [3, 2, 0, 0]),
}
every_case = pytest.mark.parametrize("name", CASES)
with_norm = pytest.mark.parametrize("layer_norm", [True, False], ids=["norm", "plain"])
with_keep = pytest.mark.parametrize("dropped", [True, False], ids=["dropped", "whole"])


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class Problem(NamedTuple):
    x: torch.Tensor
    keep: torch.Tensor | None
    start: list[torch.Tensor]
    weights: list[torch.Tensor]
    sizes: list[int]
    grads: list[torch.Tensor]  # of h, and of the last states

    @property
    def given(self):
        return self[:5]

    @staticmethod
    def draw(case, layer_norm=True, dropped=True):
        I, H, E, n, sizes = case
        rows, first = sum(sizes), sizes[0]
        shapes = [(4 * (H + E), I), (4 * (H + E), H), (4 * E, E), (4 * E,), (12 * n, E), (12 * n,)]
        shapes += [(12, H, n), (4, 1, H)]
        scale = [(I + H) ** -0.5, H**-0.5, E**-0.5, 1, E**-0.5, 1, n**-0.5, 1]
        weights = [draw(*s, scale=k) for s, k in zip(shapes, scale, strict=True)]
        for width in (H, E) if layer_norm else ():
            weights += [draw(4, 1, width), draw(4, 1, width), draw(width), draw(width)]
        keep = (torch.rand(rows, H) > 0.3).double() / 0.7 if dropped else None
        start = [draw(first, width) for width in (H, H, E, E)]
        grads = [draw(rows, H), *(draw(*t.shape) for t in start)]
        return Problem(draw(rows, I), keep, start, weights, sizes, grads)

    def to(self, dtype):
        x, keep, start, weights, sizes, grads = self
        x, keep = x.to(dtype), None if keep is None else keep.to(dtype)
        start, weights, grads = ([t.to(dtype) for t in ts] for ts in (start, weights, grads))
        return Problem(x, keep, start, weights, sizes, grads)


def specified(p):
    """Values and gradients by autograd, of the equations."""
    leaves = [t.clone().requires_grad_() for t in (p.x, *p.start, *p.weights)]
    x, start, weights = leaves[0], State(*leaves[1:5]), Weights.of(leaves[5:])
    h, ends = run(x, p.keep, start, p.sizes, weights)
    values = [h, *ends]
    return values, torch.autograd.grad(values, leaves, p.grads)


def by_ops(p, wanted=None):
    h, *rest = hyper_lstm(*p.given, True)
    wanted = wanted or [True] * (1 + len(p.weights))
    back = hyper_lstm_backward(p.grads[0], p.grads[1:], *p.given, [h, *rest[4:]], wanted)
    return [h, *rest[:4]], back


@every_case
@with_norm
@with_keep
def test_values_and_every_gradient(name, layer_norm, dropped, threads):
    p = Problem.draw(CASES[name], layer_norm, dropped)
    values, gradients = by_ops(p)
    expected, wanted = specified(p)
    for ours, theirs in zip((*values, *gradients), (*expected, *wanted), strict=True):
        close(ours, theirs, 1e-10)


def in_float32(case, layer_norm):
    """All results: ours, plain PyTorch's, exact."""
    single = Problem.draw(case, layer_norm).to(torch.float32)
    ways = by_ops(single), specified(single), specified(single.to(torch.float64))
    return [[*values, *back] for values, back in ways]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.hidden > 16])
def test_float32(name):
    """Each result by itself, where none is of very few numbers."""
    for result in zip(*in_float32(CASES[name], layer_norm=False), strict=True):
        assert_as_good(*result, size=norm)


@every_case
def test_float32_normalised(name):
    """All results together, each relative to its size. Gradients through normalisations of very
    few units nearly cancel, and lose most digits in any arithmetic."""
    case = CASES[name]
    *others, exact = in_float32(case, layer_norm=case.hyper >= 5)
    sizes = [t.norm() for t in exact]
    joined = [
        torch.cat([(t / n).flatten() for t, n in zip(ts, sizes, strict=True)])
        for ts in (*others, exact)
    ]
    assert_as_good(joined[0].float(), joined[1].float(), joined[2], size=norm)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "case",
    [Case(32, 64, 16, 4, [128] * 100), Case(4, 16, 12, 2, [8] * 1500)],
    ids=["many sequences", "many steps"],
)
def test_sums_of_many_rows(case, one_thread):
    """Each gradient of a weight by itself, a sum over all rows in one thread: one after another
    they would lose several times the digits. Of six draws together, as errors of one are luck."""
    drawn = []
    for _ in range(6):
        single = Problem.draw(case, dropped=False).to(torch.float32)
        x, keep, start, weights, sizes, grads = single
        exact, ours = by_ops(single.to(torch.float64))[1], by_ops(single)[1]
        leaves = [t.requires_grad_() for t in (x, *start, *weights)]
        with use_backend("reference"):
            values = Unrolled.apply(sizes, x, keep, *leaves[1:])
            plain = torch.autograd.grad(values, leaves, grads)
        drawn.append([ours[5:], plain[5:], exact[5:]])
    for n in range(len(drawn[0][0])):
        assert_as_good(*(torch.stack([d[i][n] for d in drawn]) for i in range(3)), size=norm)


@every_case
def test_without_what_the_derivative_needs(name):
    p = Problem.draw(CASES[name])
    h, *kept = hyper_lstm(*p.given, True)
    again, *rest = hyper_lstm(*p.given, False)
    assert all(map(torch.equal, [h, *kept[:4]], [again, *rest[:4]]))
    assert not any(t.numel() for t in rest[4:])


@every_case
def test_what_memory_held_before_does_not_matter(name, threads):
    """Scratch memory is kept from call to call: here it is full of NaN."""
    p = Problem.draw(CASES[name])
    values, gradients = by_ops(p)
    nothing = Problem(
        *(
            [t * torch.nan for t in a] if isinstance(a, list) else a * torch.nan
            for a in (p.x, p.keep, p.start, p.weights)
        ),
        p.sizes,
        p.grads,
    )
    assert all(t.isnan().all() for t in by_ops(nothing)[0] if t.numel())
    again, more = by_ops(p)
    assert all(map(torch.equal, (*values, *gradients), (*again, *more)))


def test_values_do_not_depend_on_threads():
    p, before = Problem.draw(CASES["packed chunks"]), torch.get_num_threads()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(by_ops(p))
    torch.set_num_threads(before)
    for values, gradients in found[1:]:
        assert all(map(torch.equal, values, found[0][0]))
        close(gradients, found[0][1], 1e-12)


@pytest.mark.parametrize("absent", range(17), ids=str)
def test_matrices_that_are_not_wanted(absent):
    p = Problem.draw(CASES["packed"])
    wanted = [n != absent for n in range(17)]
    whole, some = by_ops(p)[1], by_ops(p, wanted)[1]
    skipped = absent == 0 or absent - 1 in MATRICES
    for n, (a, b) in enumerate(zip(whole, some, strict=True)):
        at = n and n - 4  # those of start are always made
        if skipped and at == absent and not 1 <= n <= 4:
            assert b.shape == (0,)
        else:
            assert torch.equal(a, b)


def test_no_gradient_of_h():
    p = Problem.draw(CASES["packed"])
    h, *rest = hyper_lstm(*p.given, True)
    args = p.grads[1:], *p.given, [h, *rest[4:]], [True] * 17
    zero = hyper_lstm_backward(torch.zeros_like(h), *args)
    assert all(map(torch.equal, hyper_lstm_backward(None, *args), zero))


def test_any_strides():
    p = Problem.draw(CASES["packed"])
    strange = Problem(
        *(p.x.T.contiguous().T, torch.cat([p.keep] * 2, 1)[:, : p.keep.shape[1]]),
        *([torch.stack([t, t], -1)[..., 0] for t in ts] for ts in (p.start, p.weights)),
        *(p.sizes, [p.grads[0][:1].expand_as(p.grads[0]), *p.grads[1:]]),
    )
    same = p._replace(grads=[t.contiguous() for t in strange.grads])
    for ours, theirs in zip(by_ops(strange), by_ops(same), strict=True):
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("sizes", [[], [0], [0, 0]], ids=str)
def test_nothing(sizes):
    p = Problem.draw(Case(2, 3, 2, 1, sizes or [0]))
    values, gradients = by_ops(p._replace(sizes=sizes))
    assert [t.shape for t in values] == [p.x[:, :1].expand(0, 3).shape, *(t.shape for t in p.start)]
    assert not any(t.any() for t in gradients)


def test_fake_kernels_and_schemas():
    p = Problem.draw(CASES["packed"])
    for all_ in (True, False):
        torch.library.opcheck(hyper_lstm, (*p.given, all_), test_utils=OPCHECKS)
    h, *rest = hyper_lstm(*p.given, True)
    for wanted in ([True] * 17, [False] * 17):
        args = p.grads[0], p.grads[1:], *p.given, [h, *rest[4:]], wanted
        torch.library.opcheck(hyper_lstm_backward, args, test_utils=OPCHECKS)


OPCHECKS = "test_schema", "test_faketensor"
P = Problem.draw(CASES["packed"])
ROWS = sum(P.sizes)


def replaced(tensors, at, t):
    return [t if n == at else old for n, old in enumerate(tensors)]


BAD = {
    "three states": ("start must hold 4 entries, got 3", {"start": P.start[:3]}),
    "few weights": (
        "weights without normalisations must hold 8 entries, got 9",
        {"weights": P.weights[:9]},
    ),
    "rank": (r"x must have shape \(rows, ins\)", {"x": P.x[0]}),
    "rows": ("add up to the rows of x, 111, got more", {"x": P.x[1:]}),
    "more rows": ("add up to the rows of x, 112, got 111", {"sizes": P.sizes[:-1]}),
    "sum beyond 64 bits": ("rows of x, 112, got more", {"sizes": [2**62] * 2}),
    "integers": ("x must have dtype float64 or float32, got int64", {"x": P.x.long()}),
    "growing": ("neither grow nor be negative, got 38", {"sizes": [37, 38]}),
    "negative": ("neither grow nor be negative, got -1", {"sizes": [37, -1]}),
    "dtype": (
        r"start\[1\] must have the dtype of x",
        {"start": replaced(P.start, 1, P.start[1].float())},
    ),
    "weight's rank": (
        r"weights\[3\] must have shape \(72,\), got \(1, 72\)",
        {"weights": replaced(P.weights, 3, P.weights[3][None])},
    ),
    "keep": (r"keep.size\(0\) must be", {"keep": P.keep[1:]}),
    "state": (r"start\[1\].size\(1\) must be 67", {"start": replaced(P.start, 1, P.start[3])}),
    "sequences": (r"start\[0\].size\(0\) must be 37", {"start": [t[1:] for t in P.start]}),
    "units": ("at least 1, got 0", {"start": [t[:, :0] for t in P.start]}),
    **{
        f"weight {n}": (
            rf"weights\[{n}\].size.* must be",
            {"weights": replaced(P.weights, n, P.weights[n][..., :-1])},
        )
        for n in range(16)
    },
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    """No read beyond what was given is possible."""
    message, changed = BAD[name]
    p = P._replace(**changed)
    with pytest.raises(ValueError, match=message):
        hyper_lstm(*p.given, True)
    h, *rest = hyper_lstm(*P.given, True)
    with pytest.raises(ValueError, match=message):
        hyper_lstm_backward(*(P.grads[0], P.grads[1:], *p.given, [h, *rest[4:]], [True] * 17))


def test_half_precision_is_refused():
    half = P.to(torch.float16)
    message = "x must have dtype float64 or float32, got float16"
    with pytest.raises(ValueError, match=message):
        hyper_lstm(*half.given, True)
    kept = [half.x.new_empty(ROWS, n) for n in (67, 67, 18, 18, 608)]
    with pytest.raises(ValueError, match=message):
        hyper_lstm_backward(half.grads[0], half.grads[1:], *half.given, kept, [True] * 17)


def test_bad_input_of_the_way_back():
    h, *rest = hyper_lstm(*P.given, True)
    kept, wanted = [h, *rest[4:]], [True] * 17
    good = [P.grads[0], P.grads[1:], *P.given, kept, wanted]
    bad = {
        0: [(r"grad_h.size\(1\) must be 67", h[:, 1:])],
        1: [
            ("grad_ends must hold 4", P.grads),
            (r"grad_ends\[0\].size", [t[1:] for t in P.grads[1:]]),
        ],
        7: [("kept must hold 5", kept[1:])]
        + [(rf"kept\[{n}\].size", replaced(kept, n, kept[n][:-1])) for n in range(5)],
        8: [("wanted must hold 17 entries, got 3", [True] * 3)],
    }
    for at, cases in bad.items():
        for message, value in cases:
            with pytest.raises(ValueError, match=message):
                hyper_lstm_backward(*replaced(good, at, value))


def test_sizes_beyond_64_bits_are_refused():
    wide = torch.zeros(1, dtype=torch.float64).expand(1, 2**60)
    with pytest.raises(ValueError, match="must not multiply to more than"):
        hyper_lstm(wide, None, P.start, P.weights, [1], True)
