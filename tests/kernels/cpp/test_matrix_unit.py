"""What the matrix unit computes: numbers far from one, and PyTorch's switch for products of floats.
Where a process runs on vector units, the same holds for them.

A build with HYPERFAST_EMULATE_AMX=1 runs all of this on any machine with AVX-512.
"""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from hyperfast.plans.cpu import EXTENSION, EXTENSION_ERROR
from tests.support import flat
from tests.support.draw import draw

if EXTENSION is None:
    pytest.skip(EXTENSION_ERROR, allow_module_level=True)

op = torch.ops.hyperfast
pytestmark = pytest.mark.usefixtures("nan_poison")
UNIT = EXTENSION.isa() in ("amx", "amx_emulated")

rand = partial(draw, seed=0)


MANY = (400, 2, 20, 17, 40)  # B, N, in, out, features: enough for a matrix unit


def many(dtype=torch.float32, size=MANY):
    b, n, i, o, k = size
    sizes = (b, n, i), (b, n, o), (b, k), (o * i + o, k)
    return [rand(*size, dtype=dtype, seed=seed) for seed, size in enumerate(sizes)]


def hyper_ops(x, g, h, v, plan="contract"):
    """The forward pass and the gradients of a layer without a bias of the head."""
    m = g.shape[-1] * x.shape[-1]
    return (
        flat.hyper_linear(x, h, v, None, None, True, plan),
        flat.grad_x(g, h, v[:m], None, None, plan),
        flat.grad_h(g, x, v, None, len(x), True, plan),
        op.hyper_linear_grad_weight(g, x, h, None, True, plan),
    )


def exact_ops(x, g, h, v):
    """The same in fp64, and the sums of the absolute values of their terms."""

    def compute(x, g, h, v):
        m, b = g.shape[-1] * x.shape[-1], len(x)
        p, w = h @ v.mT, (h @ v[:m].mT).view(b, g.shape[-1], x.shape[-1])
        outer = torch.einsum("bno,bni->boi", g, x)
        flat = torch.cat([outer.flatten(1), g.sum(1)], 1)
        y = torch.einsum("boi,bni->bno", w, x) + p[:, None, m:]
        return y, torch.einsum("boi,bno->bni", w, g), flat @ v, flat.mT @ h

    args = [t.double() for t in (x, g, h, v)]
    return zip(compute(*args), compute(*(t.abs() for t in args)), strict=True)


@pytest.mark.parametrize("some", [False, True], ids=["all", "every second"])
@pytest.mark.parametrize("exponent", [-140, -120, -110, -90, -60, -30, 30, 60, 90])
def test_numbers_far_from_one(exponent, some):
    for which in range(4):
        args = many()
        args[which][:: 1 + some] *= 2.0**exponent
        largest = max(t.abs().max().item() for t in args)
        smallest = 2.0**-149 if not some or exponent > -130 else 2.0**-133
        for result, (exact, size) in zip(hyper_ops(*args), exact_ops(*args), strict=True):
            error = (result.double() - exact).abs()
            bound = 16 * 2.0**-24 * size + 300 * smallest * max(largest, 1) ** 2
            assert bool((error <= bound).all()), (which, (error / bound).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 1e37])
def test_numbers_at_the_end_of_the_range(dtype, value):
    """What is not finite, and what is near that, shows where it belongs and nowhere else."""
    for which in range(4):
        args = many(dtype)
        args[which].view(-1)[7] = value
        for result, (exact, size) in zip(hyper_ops(*args), exact_ops(*args), strict=True):
            finite = size.isfinite()
            error = (result.double() - exact).abs()[finite]
            eps = torch.finfo(dtype).eps
            assert bool((error <= 300 * 2.0**-24 * size[finite] + eps * exact[finite].abs()).all())
            assert not result[~finite].isfinite().any()
            assert torch.equal(result.isnan(), exact.isnan())


def test_a_nan_of_any_bits():
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32)
    half = torch.tensor([0x7FFF, -1, 0x7F81], dtype=torch.int16)
    for nan in (*bits.view(torch.float32), *half.view(torch.bfloat16)):
        for which in range(4):
            args = many(nan.dtype)
            args[which].view(-1)[7] = nan
            for result, (exact, _) in zip(hyper_ops(*args), exact_ops(*args), strict=True):
                assert torch.equal(result.isnan(), exact.isnan())


@pytest.mark.parametrize(
    "size", [MANY, (1024, 1, 12, 12, 32), (96, 1, 20, 97, 40), (96, 8, 32, 9, 40)], ids=str
)
@pytest.mark.parametrize("exponent", [0, -100])
def test_results_do_not_depend_on_threads(size, exponent):
    args = many(size=size)
    for t in args:
        t[len(t) // 4 : len(t) // 2] *= 2.0**exponent
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 16):
            torch.set_num_threads(count)
            results.append(hyper_ops(*args))
    finally:
        torch.set_num_threads(threads)
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


def test_beside_another_user_of_the_matrix_unit():
    """oneDNN multiplies bf16 on it too, in the same threads."""
    a, b = rand(300, 300, dtype=torch.bfloat16), rand(300, 300, dtype=torch.bfloat16, seed=1)
    args = many()
    first, product = hyper_ops(*args), a @ b
    for _ in range(5):
        assert torch.equal(a @ b, product)
        assert all(map(torch.equal, hyper_ops(*args), first))


@pytest.fixture
def precision():
    """Sets PyTorch's precision of products of floats, for one test."""
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision("highest")


# The unit roundoff of a bf16, of 8 bits. The sum of two errs by its square.
UNIT_ROUNDOFF = 2.0**-8
# How far a product is off where its factors are kept as one bf16, which errs by u of each; or as
# the sum of two, x0 + x1, which errs by u^2 of each, and without x1 y1: x1 is up to u (1 + u).
OFF = {
    "medium": (1 + UNIT_ROUNDOFF) ** 2 - 1,
    "high": (1 + UNIT_ROUNDOFF**2) ** 2 - 1 + (UNIT_ROUNDOFF * (1 + UNIT_ROUNDOFF)) ** 2,
    "highest": 0,
}
SIZED = [MANY, (1500, 1, 20, 17, 33), (1000, 4, 48, 46, 97)]  # all for the unit


def roundings(size):
    """Of sums in float: over the features or the parameters, the inputs, the rows and the tasks."""
    tasks, rows, ins, outs, features = size
    gradient = rows + outs * ins + outs
    return ins + features + 6, outs + features + 6, gradient + 4, rows + tasks + 4


@pytest.mark.parametrize("size", SIZED, ids=str)
@pytest.mark.parametrize("name", OFF)
def test_products_are_as_exact_as_asked(precision, name, size):
    args = many(size=size)
    precision(name)
    results = hyper_ops(*args)
    for result, (exact, terms), depth in zip(
        results, exact_ops(*args), roundings(size), strict=True
    ):
        bound = (OFF[name] if UNIT else 0) + depth * 2.0**-24
        error = (result.double() - exact).abs() / terms
        assert bool((error <= bound).all()), (error / bound).max()


@pytest.mark.parametrize("size", SIZED, ids=str)
def test_where_a_unit_runs_the_precision_shows(precision, size):
    """And proves that it runs; in vectors, all bits of floats count."""
    args = many(size=size)
    errors = []
    for name in OFF:
        precision(name)
        exact = [exact for exact, _ in exact_ops(*args)]
        errors.append(
            [
                ((y - e).norm() / e.norm()).item()
                for y, e in zip(hyper_ops(*args), exact, strict=True)
            ]
        )
    for medium, high, highest in zip(*errors, strict=True):
        assert 0 < highest < 2.0**-20
        if medium == high == highest:
            assert not UNIT
        else:
            assert UNIT
            assert 2.0**-19 < high < UNIT_ROUNDOFF**2 < 2.0**-11 < medium < UNIT_ROUNDOFF


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_do_not_heed_it(precision, dtype):
    args = many(dtype)
    before = hyper_ops(*args)
    precision("medium")
    assert all(map(torch.equal, hyper_ops(*args), before))


def test_the_switch_of_the_backend_is_the_same(precision):
    """PyTorch has two ways to say it."""
    args = many()
    precision("medium")
    medium = hyper_ops(*args)
    precision("highest")
    matmul = torch.backends.mkldnn.matmul
    matmul.fp32_precision = "bf16"
    try:
        assert all(map(torch.equal, hyper_ops(*args), medium))
    finally:
        matmul.fp32_precision = "ieee"


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("name", ["high", "medium"])
def test_what_is_not_finite_stays_so_in_any_precision(precision, name, value):
    many_bits = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    precision(name)
    for v in (torch.tensor([value]), many_bits):
        for which in range(4):
            args = many()
            args[which].view(-1)[7] = v
            for result, (exact, _) in zip(hyper_ops(*args), exact_ops(*args), strict=True):
                assert torch.equal(result.isnan(), exact.isnan())
                assert torch.equal(result.isinf(), exact.isinf())


def test_compiled_code_heeds_the_switch_when_it_runs(precision, dynamo):
    x, g, h, v = many()

    def step(x, h, v):
        y = flat.hyper_linear(x, h, v, None, None, True, "contract")
        return y, *torch.autograd.grad(y, (x, h, v), g)

    for t in (x, h, v):
        t.requires_grad_()
    compiled = torch.compile(step, backend="aot_eager")
    for name in ("highest", "medium", "high", "highest"):
        precision(name)
        assert all(map(torch.equal, compiled(x, h, v), step(x, h, v)))


def test_the_emulation_runs_where_it_is_named():
    named = os.environ.get("HYPERFAST_ISA") == "amx_emulated"
    assert named == (EXTENSION.isa() == "amx_emulated")


@pytest.mark.skipif("amx_emulated" not in EXTENSION.isas(), reason="not built")
@pytest.mark.skipif("HYPERFAST_ISA" in os.environ, reason="this is such a run")
def test_all_of_it_emulated():
    environment = {**os.environ, "HYPERFAST_ISA": "amx_emulated"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
