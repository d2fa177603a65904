"""The ops of QMIX's mixer, against its formula differentiated by autograd."""

from itertools import product
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from hyperfast.ops import mixer, mixer_backward
from hyperfast.plans.cpu import EXTENSION, EXTENSION_ERROR
from tests.support.budget import assert_as_good, close, norm
from tests.support.draw import draw

pytestmark = pytest.mark.skipif(EXTENSION is None, reason=EXTENSION_ERROR or "built")


class Case(NamedTuple):
    rows: int
    agents: int
    state: int
    embed: int
    hyper: int


CASES = {
    "1": Case(1, 1, 1, 1, 1),
    "3": Case(3, 3, 3, 3, 3),
    "63": Case(63, 3, 63, 63, 63),
    "nmix": Case(700, 8, 216, 32, 64),
    "padded": Case(97, 5, 11, 6, 7),
    "deep": Case(13, 2, 5, 17, 130),
    "shares": Case(2100, 3, 7, 4, 6),
    "many shares": Case(66_000, 1, 1, 1, 1),
    "none": Case(0, 3, 4, 5, 6),
}
every_case = pytest.mark.parametrize("name", CASES)


class Problem(NamedTuple):
    q: torch.Tensor
    s: torch.Tensor
    weights: list[torch.Tensor]
    grad: torch.Tensor

    @property
    def given(self):
        return self[:3]

    @staticmethod
    def draw(case):
        R, N, S, E, H = case
        shapes = [(H, S), (N * E, H), (H, S), (E, H), (E, S), (1, E), (E, S)]
        weights = [t for o, i in shapes for t in (draw(o, i, scale=i**-0.5), draw(o, scale=0.1))]
        return Problem(draw(R, N), draw(R, S), weights, draw(R, 1))

    def to(self, dtype):
        q, s, weights, grad = self
        return Problem(q.to(dtype), s.to(dtype), [w.to(dtype) for w in weights], grad.to(dtype))


def formula(q, s, weights):
    into_w1, w1, into_w2, w2, into_v, v, b1 = zip(weights[::2], weights[1::2], strict=True)
    two = lambda a, b: F.linear(F.linear(s, *a).relu(), *b)  # noqa: E731
    made = two(into_w1, w1).abs().unflatten(1, (q.shape[1], len(b1[0])))
    hidden = torch.bmm(q.unsqueeze(1), made).squeeze(1) + F.linear(s, *b1)
    return (F.elu(hidden) * two(into_w2, w2).abs()).sum(1, keepdim=True) + two(into_v, v)


def specified(p):
    """The values, and the gradients of q, of s and of the weights."""
    leaves = [t.clone().requires_grad_() for t in (p.q, p.s, *p.weights)]
    y = formula(*leaves[:2], leaves[2:])
    return [y.detach(), *torch.autograd.grad(y, leaves, p.grad)]


ALL = [True] * 3


def by_ops(p, wanted=ALL):
    y, kept = mixer(*p.given, True)
    return [y, *mixer_backward(p.grad, *p.given, kept, wanted)]


@every_case
def test_values_and_every_gradient(name):
    p = Problem.draw(CASES[name])
    for ours, theirs in zip(by_ops(p), specified(p), strict=True):
        close(ours, theirs, 1e-10)


@every_case
def test_gradients_that_are_not_wanted(name):
    """They are not made, and the others are as they were. Scratch memory holds NaN before."""
    p = Problem.draw(CASES[name])
    _, of_q, of_s, *of_weights = by_ops(p)
    for wanted in product([True, False], repeat=3):
        by_ops(
            Problem(p.q * torch.nan, p.s * torch.nan, [w * torch.nan for w in p.weights], p.grad)
        )
        _, *found = by_ops(p, wanted)
        empty = torch.empty(0, dtype=p.q.dtype)
        whole = [of_q if wanted[0] else empty, of_s if wanted[1] else empty]
        whole += of_weights if wanted[2] else []
        assert len(found) == len(whole)
        assert all(map(torch.equal, found, whole))


def in_float32(name):
    """All results: ours, plain PyTorch's, exact."""
    single = Problem.draw(CASES[name]).to(torch.float32)
    return by_ops(single), specified(single), specified(single.to(torch.float64))


@pytest.mark.parametrize("name", ["nmix", "63", "deep", "shares", "padded"])
def test_float32(name):
    """Each result by itself, where it is not of very few numbers."""
    for result in zip(*in_float32(name), strict=True):
        if result[0].numel() >= 16:
            assert_as_good(*result, size=norm)


@pytest.mark.parametrize("name", [name for name in CASES if name != "none"])
def test_float32_together(name):
    """All results, each relative to its size."""
    *others, exact = in_float32(name)
    sizes = [norm(t) or 1.0 for t in exact]
    joined = [
        torch.cat([(t / n).flatten() for t, n in zip(ts, sizes, strict=True)])
        for ts in (*others, exact)
    ]
    assert_as_good(joined[0].float(), joined[1].float(), joined[2], size=norm)


@every_case
def test_without_what_the_derivative_needs(name):
    p = Problem.draw(CASES[name])
    y, kept = mixer(*p.given, False)
    assert torch.equal(y, mixer(*p.given, True)[0])
    assert kept.shape[0] == 0


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_results_do_not_depend_on_threads(name, dtype):
    p, before = Problem.draw(CASES[name]).to(dtype), torch.get_num_threads()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(by_ops(p))
    torch.set_num_threads(before)
    assert all(all(map(torch.equal, one, found[0])) for one in found[1:])


@every_case
def test_what_memory_held_before_does_not_matter(name):
    """Scratch memory is kept from call to call: here it is full of NaN."""
    p = Problem.draw(CASES[name])
    before = by_ops(p)
    by_ops(Problem(p.q * torch.nan, p.s * torch.nan, [w * torch.nan for w in p.weights], p.grad))
    assert all(map(torch.equal, by_ops(p), before))


@pytest.mark.parametrize("name", ["nmix", "padded"])
def test_a_row_that_is_infinite_is_alone(name):
    p = Problem.draw(CASES[name])
    before = by_ops(p)[:3]
    p.q[1], p.s[3] = torch.inf, torch.inf
    for old, new in zip(before, by_ops(p)[:3], strict=True):
        others = torch.arange(len(p.q)).ne(1) & torch.arange(len(p.q)).ne(3)
        assert torch.equal(old[others], new[others])
        assert not torch.equal(old[1], new[1])
    assert torch.equal(mixer(*p.given, False)[0].isnan(), formula(*p.given).isnan())


@pytest.mark.parametrize("name", ["nmix", "padded"])
def test_what_is_not_a_number_shows_where_autograd_shows_it(name):
    p = Problem.draw(CASES[name])
    p.s[1, 0] = torch.nan
    for ours, theirs in zip(by_ops(p), specified(p), strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
    p.s[1, 0] = torch.inf
    for pair in zip(by_ops(p)[:3], specified(p)[:3], strict=True):
        torch.testing.assert_close(*pair, rtol=1e-10, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("name", ["nmix", "padded"])
def test_what_is_infinite_stays_out_of_hidden_layers_that_are_off(name):
    """Nor does it reach the state's gradient by the columns that fill vectors up."""
    p = Problem.draw(CASES[name])
    for n in (0, 4, 8, 12):
        p.weights[n][:, 0] = p.weights[n][:, 0].abs() * (1 if n == 12 else -1)
    p.s[1, 0] = torch.inf
    of_s = by_ops(p)[2]
    assert of_s.isfinite().all()
    close(of_s, specified(p)[2], 1e-10)


def test_any_strides():
    p = Problem.draw(CASES["padded"])
    wide = [torch.stack([t, t], -1)[..., 0] for t in p.weights]
    strange = Problem(p.q.T.contiguous().T, p.s[:1].expand_as(p.s), wide, p.grad[:1].expand(97, 1))
    same = Problem(p.q, strange.s.contiguous(), p.weights, strange.grad.contiguous())
    assert all(map(torch.equal, by_ops(strange), by_ops(same)))


def test_fake_kernels_and_schemas():
    p = Problem.draw(CASES["padded"])
    checks = "test_schema", "test_faketensor"
    for keep in (True, False):
        torch.library.opcheck(mixer, (*p.given, keep), test_utils=checks)
    kept = mixer(*p.given, True)[1]
    for wanted in product([True, False], repeat=3):
        given = p.grad, *p.given, kept, wanted
        torch.library.opcheck(mixer_backward, given, test_utils=checks)


P = Problem.draw(CASES["padded"])


def replaced(at, t):
    return {"weights": [t if n == at else old for n, old in enumerate(P.weights)]}


BAD = {
    "few weights": ("weights must hold 14 entries, got 13", {"weights": P.weights[:13]}),
    "rank of q": (r"q must have shape \(rows, agents\)", {"q": P.q[0]}),
    "rank of s": (r"s must have shape \(rows, state\)", {"s": P.s[0]}),
    "rows": (r"s.size\(0\) must be 97", {"s": P.s[1:]}),
    "no agents": ("at least 1, got 0", {"q": P.q[:, :0]}),
    "integers": ("q must have dtype float64 or float32, got int64", {"q": P.q.long()}),
    "half": ("q must have dtype float64 or float32, got float16", {"q": P.q.half()}),
    "dtype of s": ("s must have the dtype of q", {"s": P.s.float()}),
    "dtype of a weight": (
        r"weights\[3\] must have the dtype of q",
        replaced(3, P.weights[3].float()),
    ),
    "rank of a weight": (
        r"weights\[5\] must have shape \(7,\), got \(1, 7\)",
        replaced(5, P.weights[5][None]),
    ),
    **{
        f"weight {n}": (r"weights\[\d+\]\.size", replaced(n, P.weights[n][..., :-1]))
        for n in range(14)
    },
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    """No read beyond what was given is possible."""
    message, changed = BAD[name]
    p, kept = P._replace(**changed), mixer(*P.given, True)[1]
    with pytest.raises(ValueError, match=message):
        mixer(*p.given, True)
    with pytest.raises(ValueError, match=message):
        mixer_backward(p.grad, *p.given, kept, ALL)


@pytest.mark.parametrize("at", [0, 1], ids=["grad", "kept"])
def test_bad_input_of_the_way_back(at):
    good = [P.grad, mixer(*P.given, True)[1]]
    for bad in (good[at][1:], good[at][:, :0], good[at].float(), good[at][0]):
        grad, kept = [bad if n == at else t for n, t in enumerate(good)]
        with pytest.raises(ValueError, match="kept" if at else "grad"):
            mixer_backward(grad, *P.given, kept, ALL)
