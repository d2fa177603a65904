"""The ops of single layers on CPU tensors, by Triton's interpreter: a suite that pytest does not
collect by itself.

The interpreter has no 16-bit arithmetic, and knows nothing of a GPU's memory or its parallelism.
"""

import pytest
import torch
from torch.autograd import gradcheck

from hyperfast.functional import hyper_linear, task_linear
from hyperfast.kernels import reference
from hyperfast.kernels.triton import generated, grouped, launch, trilinear
from hyperfast.layout import TRANSFORMS
from hyperfast.plans import gpu
from tests.support.budget import assert_as_good, close, norm
from tests.support.cases import (
    FUSED,
    SIZES,
    VARIANTS,
    Sizes,
    Variant,
    every_size,
    floats,
    is_float,
    value_and_gradients,
)
from tests.support.interpreted import (
    on_triton_kernels,
    ragged_or_not,
    strided,
)

FP64, FP32 = torch.float64, torch.float32
LARGE = [
    (Sizes(17, 1, 63, 17, 3), FP64),
    (Sizes(3, 17, 17, 129, 1), FP64),
    (Sizes(2, 3, 129, 3, 17), FP64),
    (Sizes(1, 63, 3, 17, 63), FP64),
    (Sizes(5, 3, 17, 33, 17), FP32),
]
STORED = [v for v in VARIANTS if v.plan in ("tile", "materialize") and v.bias and v.target_bias]
TRANSFORMED = [v for v in VARIANTS if v.transform and not v.plan]
# Kernels read biases alike whatever the sizes and strides are.
every_biased = pytest.mark.parametrize(
    "variant", [v for v in FUSED if v.bias and v.target_bias], ids=str
)
every_transform = pytest.mark.parametrize("transform", TRANSFORMS)

# What computes each op when the weights are not stored; a library does where rows are many.
KERNELS = {
    "task_linear": "_task_linear",
    "task_linear_grad_weight": "_task_outer",
    "hyper_linear": "_contract",
    "hyper_linear_grad_h": "_contract",
    "hyper_linear_grad_weight": "_outer",
}


@pytest.fixture(autouse=True)
def launched(monkeypatch, nan_poison):
    with on_triton_kernels(monkeypatch) as count:
        yield count


@every_size
@every_biased
def test_value_and_gradients(variant, sizes):
    value_and_gradients(variant, sizes)


@pytest.mark.parametrize("variant", [v for v in FUSED if not (v.bias and v.target_bias)], ids=str)
def test_without_biases(variant):
    value_and_gradients(variant, Sizes())


@pytest.mark.parametrize(("sizes", "dtype"), LARGE, ids=str)
@every_biased
def test_value_of_larger_sizes(variant, sizes, dtype, launched):
    args = variant.random(sizes, dtype=dtype)
    y = variant.op(*args)
    exact = variant.expected(*(a.double() if is_float(a) else a for a in args))
    assert_as_good(y, variant.expected(*args), exact)
    if variant.ragged or sizes.rows < grouped.MANY:
        assert launched[KERNELS[variant.name]]


@pytest.mark.parametrize("variant", STORED, ids=str)
def test_stored_weights(variant, monkeypatch):
    """In one piece, and in blocks of a few tasks."""
    monkeypatch.setattr(gpu, "GPU_BLOCK", 8 * 60)
    value_and_gradients(variant, Sizes(7, 3, 3, 4, 6))


@pytest.mark.parametrize("size", [*SIZES[1:], Sizes(2, 70, 3, 4, 2)], ids=str)
@pytest.mark.parametrize("variant", TRANSFORMED[-2:], ids=str)
def test_transforms_of_every_size(variant, size):
    """The last is of rows so many that a library multiplies."""
    value_and_gradients(variant, size)


@pytest.mark.parametrize("variant", TRANSFORMED, ids=str)
def test_transforms(variant, launched):
    """Value and gradients; the weights are transformed, and their gradients formed, in kernels."""
    value_and_gradients(variant, Sizes())
    assert launched["_task_linear"]
    assert launched["_task_outer"]
    assert not launched["_contract"]
    assert not launched["_outer"]


@ragged_or_not
@every_transform
def test_transforms_in_fp32(transform, ragged):
    variant = Variant("hyper_linear", ragged, transform=transform)
    args = variant.random(Sizes(5, 3, 17, 33, 17), dtype=FP32, grad=True)
    exact = [a.detach().double().requires_grad_() if is_float(a) else a for a in args]
    weight = torch.randn(5 * 3, 33)

    def run(function, args):
        y = function(*args)
        seed = weight.view(y.shape).to(y.dtype)
        return y, *torch.autograd.grad(y, floats(args), seed)

    ours, plain = run(variant.op, args), run(variant.expected, args)
    for a, b, c in zip(ours, plain, run(variant.expected, exact), strict=True):
        assert a.dtype == FP32
        assert_as_good(a, b, c, size=norm)


@every_transform
def test_transforms_of_fewer_rows_than_tasks(transform, monkeypatch):
    """Weights are made for the rows, not for the tasks."""
    made, whole = [], generated._weights

    def weights(h, *rest):
        made.append(len(h))
        return whole(h, *rest)

    monkeypatch.setattr(generated, "_weights", weights)
    variant = Variant("hyper_linear", True, transform=transform)
    x, h, *made_of, _, _, plan = variant.random(Sizes(9, 1), grad=True)
    args = [x[:3], h, *made_of, torch.tensor([4, 1, 4]), transform, plan]
    expected = variant.expected(*args)
    weight, leaves = torch.randn_like(expected), [x, *floats(args[1:])]
    gradients = torch.autograd.grad(expected, leaves, weight)
    y = variant.op(*args)
    close(y, expected)
    close(torch.autograd.grad(y, leaves, weight), gradients)
    assert set(made) == {3}


@ragged_or_not
@pytest.mark.parametrize("transform", ["", "exp"])
@pytest.mark.parametrize("plan", ["", "tile"])
def test_gradients_alone(plan, transform, ragged):
    """Each as among all, and empty where it is not wanted."""
    variant = Variant("hyper_linear", ragged, transform=transform, plan=plan)
    x, h, matrix, matrix_bias, vector, _, ids, *options = variant.random()
    grad = torch.randn(*x.shape[:-1], len(matrix), dtype=FP64)

    def run(*mask):
        given = grad, x, h, matrix, matrix_bias, vector, ids, options[0], mask, options[1]
        return torch.ops.hyperfast.hyper_linear_backward(*given)

    whole = run(True, True, True)
    for n in range(3):
        found = run(*(n == m for m in range(3)))
        close(found[n], whole[n])
        assert all(not t.numel() for m, t in enumerate(found) if m != n)


def test_a_transform_that_is_none():
    *args, _, plan = Variant("hyper_linear", False).random()
    with pytest.raises(ValueError, match="transform must be one of"):
        torch.ops.hyperfast.hyper_linear(*args, "cube", plan)
    x, h, matrix, matrix_bias, vector, _, ids = args
    given = torch.randn(3, 2, 5, dtype=FP64), x, h, matrix, matrix_bias, vector, ids, "cube"
    with pytest.raises(ValueError, match="transform must be one of"):
        torch.ops.hyperfast.hyper_linear_backward(*given, [True] * 3, plan)


@pytest.mark.parametrize("how", ["transposed", "gaps", "expanded"])
@ragged_or_not
def test_strides_of_transforms(ragged, how):
    variant = Variant("hyper_linear", ragged, transform="exp")
    args = variant.random(Sizes(5, 2, 3, 4, 6))
    args = [strided(a, how) if is_float(a) and a.ndim > 1 else a for a in args]
    y = variant.expected(*args)
    close(variant.op(*args), y)
    x, h, matrix, matrix_bias, vector, _, ids, transform, plan = args
    grad = strided(torch.randn_like(y), how)
    given = grad, x, h, matrix, matrix_bias, vector, ids, transform, [True] * 3
    close(
        torch.ops.hyperfast.hyper_linear_backward(*given, plan),
        reference.hyper_linear_backward(*given),
    )


@every_biased
def test_gradcheck(variant):
    args = variant.random(Sizes(2, 2, 2, 3, 2), grad=True)
    assert gradcheck(variant.op, args, fast_mode=True)


@pytest.mark.parametrize("how", ["transposed", "gaps", "expanded"])
@every_biased
def test_strides(variant, how):
    args = variant.random(Sizes(5, 2, 3, 4, 6))
    args = [strided(a, how) if is_float(a) and a.ndim > 1 else a for a in args]
    close(variant.op(*args), variant.expected(*args))


def test_fp16_does_not_overflow():
    """Products of inputs and features would, but no weight does, nor any output."""
    x, h = torch.full((5, 1, 4), 300.0).half(), torch.full((5, 6), 300.0).half()
    weight = torch.full((3 * 4, 6), 1e-3).half()
    y = hyper_linear(x, h, weight, None, target_bias=False, plan="contract")
    exact = reference.hyper_linear(x.double(), h.double(), weight.double().unflatten(0, (3, 4)))
    assert_as_good(y, exact.half(), exact)


@pytest.mark.parametrize("multiprocessors", [1, 1000])
@pytest.mark.parametrize("variant", [v for v in FUSED if "grad_weight" in v.name], ids=str)
def test_rows_summed_in_parts(variant, multiprocessors, monkeypatch):
    """Few tiles and many rows: each part has a sum of its own."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: multiprocessors)
    args = variant.random(Sizes(300, 1, 3, 4, 2))
    close(variant.op(*args), variant.expected(*args))


@pytest.mark.parametrize("multiprocessors", [1, 1000])
@pytest.mark.parametrize("plan", ["contract", "materialize"])
def test_tiles_for_few_and_many_multiprocessors(plan, multiprocessors, monkeypatch):
    """The largest and the smallest tile, with a ragged edge in every direction."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: multiprocessors)
    variant = Variant("hyper_linear", True, plan=plan)
    args = variant.random(Sizes(67, 2, 3, 35, 18))
    close(variant.op(*args), variant.expected(*args))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_nan_stays_with_its_task():
    x, w, b = torch.randn(43, 3), torch.randn(5, 4, 3), torch.randn(5, 4)
    ids = torch.arange(43) ** 2 % 5  # unevenly many, so that blocks of rows mix tasks
    expected = reference.task_linear(x, w, b, ids)
    w[1], x[5] = torch.inf, torch.nan
    y = task_linear(x, w, b, ids)
    clean = (ids != 1) & (torch.arange(43) != 5)
    close(y[clean], expected[clean], 1e-5)
    assert not y[~clean].isfinite().any()


@pytest.mark.parametrize("bad", [-1, 5])
def test_ids_out_of_range(bad):
    ids = torch.tensor([0, bad, 1])
    with pytest.raises(IndexError, match=rf"\[0, 5\), got {bad}"):
        task_linear(torch.randn(3, 4), torch.randn(5, 2, 4), None, ids)


def test_tuning_keeps_the_fastest(monkeypatch):
    """Every configuration is tried once for a size, and is as right as the default."""
    variant = Variant("hyper_linear", False, plan="contract")
    args = variant.random(Sizes(40, 1, 3, 20, 5))
    times = iter([3.0, 1.0, 2.0])
    tried = []

    def clock(call):
        call()
        tried.append(call)
        return next(times)

    monkeypatch.setattr(launch, "AUTOTUNE", True)
    monkeypatch.setattr(launch, "tuned", {})
    monkeypatch.setattr(launch, "milliseconds", clock)
    for _ in range(2):
        close(variant.op(*args), variant.expected(*args))
    assert len(tried) == len(trilinear.CONTRACT["fp64"])
    assert list(launch.tuned.values()) == [trilinear.CONTRACT["fp64"][1]]
