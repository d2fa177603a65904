"""The Triton kernels on CPU tensors, by Triton's interpreter; run by test_triton.py.

The interpreter has no 16-bit arithmetic, and knows nothing of a GPU's memory or its parallelism.
"""

from collections import Counter

import pytest
import torch
from cases import (
    FUSED,
    VARIANTS,
    Sizes,
    Variant,
    close,
    every_fused,
    every_size,
    is_float,
    value_and_gradients,
)
from torch.autograd import gradcheck

import hyperfast
from hyperfast import plan, reference
from hyperfast import triton_kernels as kernels
from hyperfast.functional import hyper_linear, task_linear

FP64, FP32 = torch.float64, torch.float32
LARGE = [
    (Sizes(17, 1, 63, 17, 3), FP64),
    (Sizes(3, 17, 17, 129, 1), FP64),
    (Sizes(2, 3, 129, 3, 17), FP64),
    (Sizes(1, 63, 3, 17, 63), FP64),
    (Sizes(5, 3, 17, 33, 17), FP32),
]
STORED = [v for v in VARIANTS if v.plan in ("tile", "materialize") and v.bias and v.target_bias]

# What computes each op when the weights are not stored; a library does where rows are many.
KERNELS = {
    "task_linear": "_task_linear",
    "task_linear_grad_weight": "_task_outer",
    "hyper_linear": "_contract",
    "hyper_linear_grad_x": "_contract",
    "hyper_linear_grad_h": "_contract",
    "hyper_linear_grad_weight": "_outer",
}


@pytest.fixture(autouse=True)
def launched(monkeypatch, nan_poison):
    """Runs the ops on Triton kernels, and counts their launches."""
    count = Counter()
    launch = kernels._launch

    def counting(kernel, programs, *args, **options):
        count[kernel.fn.__name__] += programs
        launch(kernel, programs, *args, **options)

    monkeypatch.setattr(kernels, "_launch", counting)
    with hyperfast.use_backend("triton"):
        yield count


@every_size
@every_fused
def test_value_and_gradients(variant, sizes):
    value_and_gradients(variant, sizes)


@pytest.mark.parametrize(("sizes", "dtype"), LARGE, ids=str)
@every_fused
def test_value_of_larger_sizes(variant, sizes, dtype, launched):
    args = variant.random(sizes, dtype=dtype)
    y = variant.op(*args)
    exact = variant.expected(*(a.double() if is_float(a) else a for a in args))
    if dtype == FP64:
        close(y, exact)
    else:  # twice the error of the specification itself in fp32, and a rounding
        error = (variant.expected(*args).double() - exact).abs().max()
        budget = 2 * error + exact.abs().max() * torch.finfo(dtype).eps
        assert (y.double() - exact).abs().max() <= budget
    if variant.ragged or sizes.rows < kernels.MANY:
        assert launched[KERNELS[variant.name]]


@pytest.mark.parametrize("variant", STORED, ids=str)
def test_stored_weights(variant, monkeypatch):
    """In one piece, and in blocks of a few tasks."""
    monkeypatch.setattr(plan, "GPU_BLOCK", 8 * 60)
    args = variant.random(Sizes(7, 3, 3, 4, 6))
    close(variant.op(*args), variant.expected(*args))


@every_fused
def test_gradcheck(variant):
    args = variant.random(Sizes(2, 2, 2, 3, 2), grad=True)
    assert gradcheck(variant.op, args, fast_mode=True)


def strided(t, how):
    """The same values under other strides; what lies between them is NaN."""
    if how == "transposed":
        return t.mT.contiguous().mT
    if how == "gaps":
        return torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]
    return t[..., :1].expand_as(t)  # other values, of stride 0


@pytest.mark.parametrize("how", ["transposed", "gaps", "expanded"])
@every_fused
def test_strides(variant, how):
    args = variant.random(Sizes(5, 2, 3, 4, 6))
    args = [strided(a, how) if is_float(a) and a.ndim > 1 else a for a in args]
    close(variant.op(*args), variant.expected(*args))


@pytest.mark.parametrize("multiprocessors", [1, 1000])
@pytest.mark.parametrize("variant", [v for v in FUSED if "grad_weight" in v.name], ids=str)
def test_rows_summed_in_parts(variant, multiprocessors, monkeypatch):
    """Few tiles and many rows: each part has a sum of its own."""
    monkeypatch.setattr(kernels, "_multiprocessors", lambda device: multiprocessors)
    args = variant.random(Sizes(300, 1, 3, 4, 2))
    close(variant.op(*args), variant.expected(*args))


@pytest.mark.parametrize("multiprocessors", [1, 1000])
@pytest.mark.parametrize("plan", ["contract", "materialize"])
def test_tiles_for_few_and_many_multiprocessors(plan, multiprocessors, monkeypatch):
    """The largest and the smallest tile, with a ragged edge in every direction."""
    monkeypatch.setattr(kernels, "_multiprocessors", lambda device: multiprocessors)
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


def test_offsets_beyond_32_bits(monkeypatch):
    """Rows, tasks and weights that lie 2^31 elements apart, in memory that is only reserved."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    far = 2**31

    def apart(*shape):
        steps = [1] * len(shape)
        for n in range(len(shape) - 2, 0, -1):
            steps[n] = steps[n + 1] * shape[n + 1]
        t = torch.empty(far * (shape[0] - 1) + 4096).as_strided(shape, (far, *steps[1:]))
        return t.copy_(torch.randn(shape))

    x, w = apart(2, 1, 3), apart(2, 4, 3)
    close(task_linear(x, w), reference.task_linear(x, w), 1e-5)
    close(
        torch.ops.hyperfast.task_linear_grad_weight(x, x, None, 2),
        reference.task_linear_grad_weight(x, x, None, 2),
        1e-5,
    )
    h, weight = apart(2, 2), apart(3, 2)
    args = x, h, weight, None, None, False
    close(
        hyper_linear(*args[:5], target_bias=False, plan="contract"),
        reference.hyper_linear(*args),
        1e-5,
    )


def test_a_model_and_its_gradients(launched):
    hyper = hyperfast.HyperNet(3, 4, (5, 6), 2, target_activation="silu").double()
    model = hyperfast.HyperMLP(hyper)
    x, z = torch.randn(17, 4, dtype=FP64), torch.randn(4, 3, dtype=FP64)
    ids = torch.randint(4, (17,))
    y = model(x, z, ids)
    assert launched["_contract"] + launched["_task_linear"]
    gradients = torch.autograd.grad(y.square().sum(), list(model.parameters()))
    with hyperfast.use_backend("reference"):
        expected = model(x, z, ids)
        wanted = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    close(y, expected)
    close(gradients, wanted)


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

    monkeypatch.setattr(kernels, "AUTOTUNE", True)
    monkeypatch.setattr(kernels, "tuned", {})
    monkeypatch.setattr(kernels, "_milliseconds", clock)
    for _ in range(2):
        close(variant.op(*args), variant.expected(*args))
    assert len(tried) == len(kernels.CONTRACT["fp64"])
    assert list(kernels.tuned.values()) == [kernels.CONTRACT["fp64"][1]]
