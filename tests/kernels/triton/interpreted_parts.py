"""fp32 products in parts of bf16, by Triton's interpreter, as ``interpreted_layers.py``: here they
are split whatever the work is. Parts are the numbers that a GPU would multiply, stored in fp32."""

from functools import partial
from itertools import pairwise, product

import pytest
import torch

from hyperfast.kernels import reference
from hyperfast.kernels.triton.parts import packed
from hyperfast.plans import gpu
from tests.support.budget import assert_as_good, norm
from tests.support.cases import Sizes, Variant, is_float
from tests.support.interpreted import choose, on_triton_kernels, one_kernel_or_layers, ragged_or_not
from tests.support.networks import expected, random, text

FP64, FP32 = torch.float64, torch.float32
every_way = pytest.mark.parametrize("way", gpu.PARTS)
OPS = ("hyper_linear", "hyper_linear_grad_h", "hyper_linear_grad_weight")
# The gradient of the head has three parts, or is TF32, which the interpreter knows not.
every_op = pytest.mark.parametrize(
    ("name", "way"), [(n, w) for n, w in product(OPS, gpu.PARTS) if n != OPS[2] or w == "bf16x6"]
)
# What a product of two numbers may lose where these keep 8 or 16 bits, and the smallest product of
# their parts is left out; of three parts as much as one rounding of fp32, which the depth counts.
LOST = {"bf16x1": 2**-7 + 2**-16, "bf16x3": 2**-15, "bf16x6": 0.0}


@pytest.fixture(autouse=True)
def launched(monkeypatch, nan_poison):
    with on_triton_kernels(monkeypatch) as count:
        yield count


def split(monkeypatch, way):
    """Every product of fp32 numbers in this way."""
    monkeypatch.setattr(gpu, "products", lambda *_: way)


def every_float():
    """Some of each exponent, of both signs, subnormal ones and the largest too."""
    exponents = torch.arange(-149.0, 128.0, dtype=FP64)
    numbers = torch.ldexp(1 + torch.rand(8, len(exponents), dtype=FP64), exponents)
    edges = torch.tensor([0.0, -0.0, 3.4028234e38, 3.39e38, 3.3895314e38, 2**-149], dtype=FP64)
    found = torch.cat([numbers.flatten(), edges]).float()
    found = torch.cat([found, -found])
    return found[found.isfinite()].view(1, 1, -1)


def sum_of(parts):
    scale = torch.tensor([1.0, 2**-8, 2**-16], dtype=FP64)[: len(parts)]
    return (parts.double() * scale.view(-1, 1, 1, 1)).sum(0)


@pytest.mark.parametrize(("parts", "error"), [(1, 2**-8), (2, 2**-16), (3, 0)])
def test_a_float_is_the_sum_of_its_parts(parts, error):
    x = every_float()
    found = packed(x, parts)[..., : x.shape[2]]
    assert torch.equal(found.bfloat16().float(), found.float())
    assert found.isfinite().all()
    # What remains of subnormal numbers has no more digits than these.
    least = 2.0 ** (-134 - 8 * (parts - 1)) if parts < 3 else 0
    assert ((sum_of(found) - x.double()).abs() <= (error * x.double().abs()).clamp(min=least)).all()


def test_what_is_not_finite_is_the_last_part():
    x = torch.tensor([torch.inf, -torch.inf, torch.nan]).view(1, 1, 3)
    for parts in (2, 3):
        found = packed(x, parts)[:, 0, 0, :3]
        assert found[0].tolist()[:2] == [1, -1]
        assert torch.equal(found[-1][:2], x[0, 0, :2])
        assert found[-1][2].isnan()
        assert found[:-1].isfinite().all()


@every_op
@ragged_or_not
@pytest.mark.parametrize("sizes", [Sizes(5, 3, 17, 33, 17), Sizes(3, 1, 1, 2, 70)], ids=str)
def test_layers(sizes, name, ragged, way, monkeypatch):
    """No worse than plain fp32, in six products; else by what numbers keep, for each element."""
    split(monkeypatch, way)
    variant = Variant(name, ragged, plan="contract")
    args = variant.random(sizes, dtype=FP32)
    y = variant.op(*args)
    wide = [a.double() if is_float(a) else a for a in args]
    exact = variant.expected(*wide)
    if way == "bf16x6":
        assert_as_good(y, variant.expected(*args), exact)
    size = variant.expected(*(a.abs() if is_float(a) else a for a in wide))
    depth = sizes.tasks * sizes.rows + sizes.ins + sizes.outs + sizes.features
    bound = (LOST[way] + depth * torch.finfo(FP32).eps / 2) * size
    assert ((y.double() - exact).abs() <= bound).all()


@every_way
def test_every_product_counts(way, monkeypatch):
    """Errors are those of the way, not of one with more parts, or fewer."""
    split(monkeypatch, way)
    h, matrix, x = torch.rand(40, 64) + 1, torch.rand(16, 16, 64) + 1, torch.rand(40, 1, 16) + 1
    y = torch.ops.hyperfast.hyper_linear(x, h, matrix, None, None, None, None, "", "contract")
    exact = reference.hyper_linear(x.double(), h.double(), matrix.double())
    error = norm(y.double() - exact) / norm(exact)
    least, most = {"bf16x1": (1e-5, 1e-2), "bf16x3": (1e-8, 1e-5), "bf16x6": (0, 2e-7)}[way]
    assert least <= error <= most


@pytest.mark.parametrize("scales", [(1e-37, 1e30), (1e-42, 1e34), (1e34, 1e-40), (1e15, 1e15)])
@pytest.mark.parametrize("name", OPS)
def test_small_and_large_numbers(name, scales, monkeypatch):
    """They keep as many digits as in plain fp32, where nothing but what is subnormal has fewer."""
    split(monkeypatch, "bf16x6")
    variant = Variant(name, False, plan="contract")
    args = list(variant.random(Sizes(20, 1, 4, 4, 8), dtype=FP32))
    first, second = (2, 0) if name == "hyper_linear_grad_weight" else (1, 2)
    args[first], args[second] = args[first] * scales[0], args[second] * scales[1]
    wide = [a.double() if is_float(a) else a for a in args]
    y, exact = variant.op(*args), variant.expected(*wide)
    size = variant.expected(*(a.abs() if is_float(a) else a for a in wide))
    bound = 40 * 2**-24 * size + 80 * 2**-149 * max(scales)
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("way", ["fp32", "bf16x6"])
@pytest.mark.parametrize("shape", [(5, 3, 7), (5, 7, 3), (3, 65, 66), (2, 70, 69)])
@pytest.mark.parametrize("small", [0, 1])
def test_the_smallest_numbers_are_not_halved(small, shape, way, monkeypatch):
    """In layers that fill no tile some numbers come twice: an odd subnormal one has no half."""
    split(monkeypatch, way)
    _, ins, features = shape
    given = [torch.randint(-9, 10, s).float() for s in ((4, 1, ins), (4, features), shape)]
    given[small] *= 2.0**-149
    given[2] *= 2.0**100
    x, h, matrix = given
    y = torch.ops.hyperfast.hyper_linear(x, h, matrix, None, None, None, None, "", "contract")
    exact = reference.hyper_linear(x.double(), h.double(), matrix.double())
    assert torch.equal(y.double(), exact)


def same(y, want):
    """Finite, infinite and NaN in the same places."""
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(y.isinf(), want.isinf())
    assert torch.equal(y.sign()[y.isinf()], want.sign()[want.isinf()])
    torch.testing.assert_close(y[y.isfinite()], want[want.isfinite()], rtol=2e-2, atol=2e-2)


@every_op
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_infinities_and_nan(name, way, monkeypatch):
    """One in each operand; next to numbers that are one part, and next to 0: as in plain fp32."""
    variant = Variant(name, False, False, False, plan="contract")
    for n, value in product(range(3), (torch.inf, -torch.inf, torch.nan)):
        args = variant.random(Sizes(20, 1, 4, 4, 8), dtype=FP32)
        given = [a for a in args if is_float(a)]
        for a in given:
            a.view(-1)[::3] = a.view(-1)[::3].sign()
            a.view(-1)[::7] = 0
        given[n % len(given)].view(-1)[[5, -2]] = value
        split(monkeypatch, "fp32")
        plain = variant.op(*args)
        split(monkeypatch, way)
        y = variant.op(*args)
        assert not plain.isfinite().all()
        same(y, plain)
        if name == OPS[0]:  # derivatives may be contracted in other orders
            same(y, variant.expected(*args))


@pytest.mark.parametrize("way", ["fp32", *gpu.PARTS, "half"])
@pytest.mark.parametrize("shape", [(5, 3, 7), (5, 7, 3), (3, 65, 66), (2, 70, 69)])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_infinity_in_layers_that_fill_no_tile(shape, way, monkeypatch):
    """There is no 0 past the widths that infinity would meet, which would be NaN."""
    split(monkeypatch, way)
    _, ins, features = shape
    shapes = shape, (4, 1, ins), (4, features)
    dtype = torch.float16 if way == "half" else FP32
    matrix, x, h = (torch.rand(s, dtype=dtype) + 1 for s in shapes)
    x[1, 0, 0] = x[3, 0, -1] = h[2, 0] = torch.inf
    y = torch.ops.hyperfast.hyper_linear(x, h, matrix, None, None, None, None, "", "contract")
    assert y[1:].isinf().all()
    same(y, reference.hyper_linear(x, h, matrix))


@pytest.mark.parametrize("way", ["fp32", *gpu.PARTS])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_infinity_in_networks_that_fill_no_tile(way, monkeypatch, launched):
    choose(monkeypatch, True)
    split(monkeypatch, way)
    sizes, h = (3, 5, 9, 2), torch.rand(4, 3) + 1
    h[1, 0] = torch.inf
    params = sum(o * (i + 1) for i, o in pairwise(sizes))
    args = torch.rand(4, 1, 3) + 1, h, torch.rand(params, 3) + 1, torch.rand(params), None
    net = text(sizes, "relu,relu,identity")
    y, _ = torch.ops.hyperfast.hyper_mlp(*args, net, False)
    assert launched["_hyper_mlp"]
    assert y[1].isinf().all()
    same(y, expected(*args, net))


@ragged_or_not
@one_kernel_or_layers
def test_networks(whole, ragged, monkeypatch, launched):
    """As of networks in plain fp32: value and gradients."""
    choose(monkeypatch, whole)
    split(monkeypatch, "bf16x6")
    size = (3, 18, 20, 2), 9, 2, 17
    for bias in (False, True):
        given = random(*size, ragged=ragged, bias=bias)
        args, exact = (
            [a.detach().to(FP32).to(at).requires_grad_() if is_float(a) else a for a in given]
            for at in (FP32, FP64)
        )
        net = text(size[0], "elu,silu,sigmoid")

        def run(function, args, net=net):
            y = function(*args, net)
            return y, *torch.autograd.grad(y.sum(), [a for a in args if is_float(a)])

        ours = run(lambda *a: torch.ops.hyperfast.hyper_mlp(*a, True)[0], args)
        for a, b, c in zip(ours, run(expected, args), run(expected, exact), strict=True):
            assert_as_good(a, b, c, size=norm)
    assert bool(launched["_hyper_mlp"]) == whole


@ragged_or_not
def test_pairs_of_fp16_do_not_overflow(ragged):
    """Products of inputs and gradients would, but no gradient of the head does."""
    ids = torch.arange(5) if ragged else None
    x, grad = (torch.full((5, n) if ragged else (5, 1, n), 300.0).half() for n in (4, 3))
    h = torch.full((5, 6), 1e-2).half()
    op = torch.ops.hyperfast.hyper_linear_grad_weight
    y = op(grad, x, h, ids, True, "contract")
    wide = partial(torch.Tensor.to, dtype=FP64)
    exact = reference.hyper_linear_grad_weight(wide(grad), wide(x), wide(h), ids, True)
    assert_as_good(y, exact.half(), exact)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_pairs_of_fp16_keep_its_digits():
    """They are rounded to 11 bits, and what is not finite stays so."""
    grad, x, h = (torch.randn(40, *size).half() for size in ((1, 4), (1, 8), (5,)))

    def run():
        return torch.ops.hyperfast.hyper_linear_grad_weight(grad, x, h, None, False, "contract")

    wide = [t.double() for t in (grad, x, h)]
    exact, size = (
        reference.hyper_linear_grad_weight(*given, None, False)
        for given in (wide, [t.abs() for t in wide])
    )
    y = run()
    bound = 2**-11 * size + 2**-11 * exact.abs()
    assert ((y.double() - exact).abs() <= bound).all()
    grad[3, 0, 1], x[5, 0, 2] = torch.inf, torch.nan
    y = run().view(4, 8, 5)
    assert y[:, 2].isnan().all()
    y[:, 2] = 0
    assert not y[1, [0, 1, *range(3, 8)]].isfinite().any()
    y[1] = 0
    assert y.isfinite().all()
