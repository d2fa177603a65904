"""Networks on CPU tensors, by Triton's interpreter, as ``interpreted_layers.py``."""

from itertools import product

import pytest
import torch
from torch.autograd import gradcheck

import hyperfast
from hyperfast.activations import KNOWN
from hyperfast.bank.formats import format_of
from hyperfast.functional import hyper_linear, task_linear
from hyperfast.kernels import reference
from hyperfast.kernels.triton import trilinear
from hyperfast.layout import Network
from hyperfast.ops import network as networks
from tests.support.budget import assert_as_good, close, norm
from tests.support.cases import (
    Sizes,
    Variant,
    floats,
    is_float,
)
from tests.support.draw import draw
from tests.support.interpreted import (
    NETWORKS,
    WIDE,
    choose,
    on_triton_kernels,
    one_kernel_or_layers,
    ragged_or_not,
    strided,
)
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

FP64, FP32 = torch.float64, torch.float32


@pytest.fixture(autouse=True)
def launched(monkeypatch, nan_poison):
    with on_triton_kernels(monkeypatch) as count:
        yield count


def check_network(size, activations, ragged, *, bias=True, target_bias=True):
    args = random(*size, ragged=ragged, bias=bias, target_bias=target_bias)
    check(args, text(size[0], activations, target_bias))


def check(args, net):
    """The value, what is kept, and every gradient."""
    y = expected(*args, net)
    weight = torch.randn_like(y)
    tensors = [a for a in args[:4] if a is not None]
    gradients = torch.autograd.grad(y, tensors, weight)
    ours, hidden = torch.ops.hyperfast.hyper_mlp(*args, net, True)
    close(ours, y)
    close(hidden, networks._hyper_mlp(*args, net, True)[1])
    close(torch.autograd.grad(ours, tensors, weight), gradients)
    with torch.no_grad():
        alone, nothing = torch.ops.hyperfast.hyper_mlp(*args, net, False)
    assert torch.equal(alone, ours)
    assert not nothing.numel()


@ragged_or_not
@one_kernel_or_layers
@pytest.mark.parametrize("size", NETWORKS, ids=str)
def test_generated_networks(size, whole, ragged, monkeypatch, launched):
    choose(monkeypatch, whole)
    for both in (False, True):
        last = "tanh" if both else "identity"
        activations = ",".join(["silu"] * (len(size[0]) - 2) + [last])
        check_network(size, activations, ragged, bias=both, target_bias=both)
    assert bool(launched["_hyper_mlp"]) == (whole and size[1] * size[2] > 0)


@pytest.mark.parametrize("activation", [*KNOWN, "leaky_relu:0.2", "sin:3.0"])
def test_activations(activation, monkeypatch):
    """In one kernel, and their slopes in those of layers: the same code finishes both."""
    choose(monkeypatch, True)
    check_network(NETWORKS[0], f"{activation},{activation}", True, bias=False)


@pytest.mark.parametrize("function", ["tanh", "elu", "softplus"])
def test_digits_near_0(function):
    """Of what is a difference near 0 no digit is lost there, nor elsewhere."""
    size = torch.logspace(-6, 1, 200)
    x = torch.cat([size, -size]).unsqueeze(1)
    ids = torch.zeros(len(x), dtype=torch.int64)
    y = torch.ops.hyperfast.task_mlp(x, torch.ones(1, 1), None, ids, f"1 > 1 {function}")
    exact = KNOWN[function].value(x.double(), 1.0)
    assert ((y.double() - exact) / exact).abs().max() <= 4 * torch.finfo(FP32).eps


@pytest.mark.parametrize("sizes", [(3, 5, 4), (20, 33, 1), (1, 17, 40)], ids=str)
def test_every_bias_of_a_network(sizes, monkeypatch):
    """Groups of outputs, full and not; features in more blocks than one."""
    choose(monkeypatch, True)
    for bias, target_bias in product((False, True), (False, True)):
        check_network((sizes, 3, 2, 18), "tanh,identity", False, bias=bias, target_bias=target_bias)


def test_a_wide_network_runs_by_its_layers(launched):
    check_network(WIDE, "relu,identity", False)
    assert launched["_contract"]
    assert not launched["_hyper_mlp"]


# The last has inputs beside its own that are not 0, nor would its transformed weights be.
every_mixed = pytest.mark.parametrize("network", [*MIXED, "3 > 5 b sigmoid, 2 softplus(W)"])


def check_stored(x, weight, ids, network):
    """The value, both gradients, and each of them alone."""
    x.requires_grad_()
    weight.requires_grad_()
    y = expected_stored(x, weight, ids, network)
    grad = torch.randn_like(y)
    gradients = torch.autograd.grad(y, (x, weight), grad)
    ours = torch.ops.hyperfast.task_mlp(x, weight, None, ids, network)
    close(ours, y)
    close(torch.autograd.grad(ours, (x, weight), grad), gradients)
    for n in range(2):
        given = grad, x.detach(), weight.detach(), ids, network, [n == 0, n == 1]
        found = torch.ops.hyperfast.task_mlp_backward(*given)
        close(found[n], gradients[n])
        assert not found[1 - n].numel()


@ragged_or_not
@one_kernel_or_layers
@every_mixed
def test_transforms_and_mixed_biases(network, whole, ragged, monkeypatch, launched):
    choose(monkeypatch, whole)
    check(random_for(network, 3, 5, 4, ragged=ragged), network)
    assert not launched["_hyper_mlp"]
    check_stored(*stored_for(network, 3, 5, ragged=ragged, scale=0.5), network)
    assert bool(launched["_task_mlp"]) == whole
    assert launched["_task_outer"]


@ragged_or_not
@one_kernel_or_layers
@every_mixed
def test_transforms_of_int8(network, whole, ragged, monkeypatch):
    """Steps are widened by their scales, then transformed."""
    choose(monkeypatch, whole)
    x, _, ids = stored_for(network, 3, 5, ragged=ragged)
    net = Network.parse(network)
    steps = torch.randint(-9, 9, (3, net.weight_numel), dtype=torch.int8)
    vectors = draw(3, net.vector_numel, scale=0.1)
    given = x, steps, vectors, ids, network
    plain = networks.by_task_layers(*given, reference.task_linear)
    close(torch.ops.hyperfast.task_mlp(*given), plain)


@pytest.mark.parametrize("size", [(1, 1), (3, 63), (2, 70), (5, 1), (0, 2), (3, 0)], ids=str)
@ragged_or_not
def test_gradients_of_stored_networks(size, ragged):
    """Of no rows, of one a task, and of so many that a library multiplies."""
    check_stored(*stored_for(MIXED[0], *size, ragged=ragged), MIXED[0])


@ragged_or_not
def test_mixed_biases_in_one_kernel(ragged, monkeypatch, launched):
    choose(monkeypatch, True)
    network = "3 > 17 elu, 4 b tanh, 2"
    for bias in (False, True):
        check(random_for(network, 3, 5, 4, ragged=ragged, bias=bias), network)
    assert launched["_hyper_mlp"]


@ragged_or_not
@every_mixed
def test_transforms_of_networks_in_fp32(network, ragged):
    args = random_for(network, 7, 3, 4, ragged=ragged)
    x, weight, ids = stored_for(network, 7, 3, ragged=ragged, scale=0.5)

    def compare(ours, plain, given):
        def run(function, dtype):
            at = [
                a.detach().to(FP32).to(dtype).requires_grad_() if is_float(a) else a for a in given
            ]
            y = function(*at, network)
            return y, *torch.autograd.grad(y.sum(), floats(at))

        for a, b, c in zip(run(ours, FP32), run(plain, FP32), run(plain, FP64), strict=True):
            assert a.dtype == FP32
            assert_as_good(a, b, c, size=norm)

    compare(lambda *a: torch.ops.hyperfast.hyper_mlp(*a, True)[0], expected, args)
    compare(
        lambda x, w, *rest: torch.ops.hyperfast.task_mlp(x, w, None, *rest),
        expected_stored,
        [x, weight, ids],
    )


@pytest.mark.parametrize("name", ["x", "weight", "grad"])
def test_shapes_and_dtypes_of_gradients(name):
    x, weight, _ = stored_for(MIXED[0], 3, 2, ragged=False)
    good = {"grad": torch.randn(3, 2, 2, dtype=FP64), "x": x, "weight": weight}

    def run(bad):
        args = (good | {name: bad}).values()
        torch.ops.hyperfast.task_mlp_backward(*args, None, MIXED[0], [True, True])

    with pytest.raises(ValueError, match=f"{name} must have shape"):
        run(good[name].repeat_interleave(2, -1))
    with pytest.raises(ValueError, match="must"):
        run(good[name][1:])
    with pytest.raises(TypeError, match="dtype"):
        run(good[name].float())


@ragged_or_not
@one_kernel_or_layers
def test_networks_in_fp32(whole, ragged, monkeypatch):
    """Twice the error of PyTorch in fp32, and a rounding, in norm: value and gradients. Without the
    head's bias, of a size that takes hidden layers to where rounding is amplified."""
    choose(monkeypatch, whole)
    size = (3, 33, 20, 2), 9, 3, 17
    given = random(*size, ragged=ragged, bias=False)
    args, exact = (
        [a.detach().to(FP32).to(dtype).requires_grad_() if is_float(a) else a for a in given]
        for dtype in (FP32, FP64)
    )
    net = text(size[0], "elu,silu,sigmoid")

    def run(function, args):
        y = function(*args, net)
        return y, *torch.autograd.grad(y.sum(), floats(args))

    ours = run(lambda *a: torch.ops.hyperfast.hyper_mlp(*a, True)[0], args)
    for a, b, c in zip(ours, run(expected, args), run(expected, exact), strict=True):
        assert a.dtype == FP32
        assert_as_good(a, b, c, size=norm)


@ragged_or_not
@one_kernel_or_layers
def test_gradcheck_of_networks(whole, ragged, monkeypatch):
    choose(monkeypatch, whole)
    *args, ids = random((2, 3, 2), 2, 2, 3, ragged=ragged)

    def network(*tensors):
        net = text((2, 3, 2), "sin:2.0,tanh")
        return torch.ops.hyperfast.hyper_mlp(*tensors, ids, net, True)[0]

    assert gradcheck(network, args, fast_mode=True)


@pytest.mark.parametrize("how", ["transposed", "gaps", "expanded"])
@one_kernel_or_layers
def test_strides_of_networks(whole, how, monkeypatch):
    choose(monkeypatch, whole)
    net = text((3, 5, 4), "relu,tanh")
    args = random((3, 5, 4), 3, 2, 6, grad=False)
    args = [strided(a, how) if is_float(a) and a.ndim > 1 else a for a in args]
    y, hidden = torch.ops.hyperfast.hyper_mlp(*args, net, True)
    close(y, expected(*args, net))
    for grad in (torch.randn_like(y), torch.randn(1, 1, 1, dtype=FP64).expand_as(y)):
        given = grad, *args, hidden, net, [True, True, True, True]
        close(torch.ops.hyperfast.hyper_mlp_backward(*given), networks._hyper_mlp_backward(*given))
    x, weight, _ = stored((3, 5, 4), 3, 2, ragged=False)
    x, weight = strided(x, how), strided(weight, how)
    y = torch.ops.hyperfast.task_mlp(x, weight, None, None, net)
    close(y, apply_stored(x, weight, None, net))
    given = strided(torch.randn_like(y), how), x, weight, None, "3 > 5 b relu exp(W), 4 b tanh"
    found = torch.ops.hyperfast.task_mlp_backward(*given, [True, True])
    close(found, networks._task_mlp_backward(*given, [True, True]))


@ragged_or_not
@one_kernel_or_layers
@pytest.mark.parametrize("size", [*NETWORKS, WIDE, ((5, 20, 3), 3, 40, 1)], ids=str)
def test_stored_networks(size, whole, ragged, monkeypatch):
    choose(monkeypatch, whole)
    sizes, tasks, rows, _ = size
    x, weight, ids = stored(sizes, tasks, rows, ragged=ragged)
    net = text(sizes, ",".join(["silu"] * (len(sizes) - 2) + ["tanh"]))
    y = torch.ops.hyperfast.task_mlp(x, weight, None, ids, net)
    close(y, apply_stored(x, weight, ids, net))


@ragged_or_not
@one_kernel_or_layers
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [NETWORKS[3], ((5, 20, 3), 3, 40, 1)], ids=str)
def test_stored_steps_of_int8(size, bias, whole, ragged, monkeypatch):
    choose(monkeypatch, whole)
    sizes, tasks, rows, _ = size
    kept = format_of(hyperfast.MLPSpec(sizes, bias), torch.int8)
    flat = torch.randn(tasks, kept.spec.numel, dtype=FP64)
    steps, affine = kept.encode(flat)
    x, _, ids = stored(sizes, tasks, rows, ragged=ragged)
    given = x, steps, affine.double(), ids, text(sizes, "tanh", bias)
    close(torch.ops.hyperfast.task_mlp(*given), networks.by_task_layers(*given))


@one_kernel_or_layers
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_nan_stays_with_its_network(whole, monkeypatch):
    choose(monkeypatch, whole)
    sizes, net = (3, 4, 2), text((3, 4, 2), "relu")
    x, weight, _ = stored(sizes, 5, 9, ragged=True)
    ids = torch.arange(45) ** 2 % 5  # unevenly many, so that blocks of rows mix tasks
    clean = apply_stored(x, weight, ids, net)
    weight[1], x[5] = torch.nan, torch.nan
    y = torch.ops.hyperfast.task_mlp(x, weight, None, ids, net)
    others = (ids != 1) & (torch.arange(45) != 5)
    close(y[others], clean[others])
    assert not y[~others].isfinite().any()


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_an_infinity_past_which_tiles_are_filled_up(rows, monkeypatch):
    """The zeros there, times infinity, are NaN: they do not count."""
    choose(monkeypatch, True)
    net = Network.parse("3 > 18 b relu, 9 relu, 2 b")
    ids = torch.arange(3).repeat_interleave(rows)
    x, weight = torch.rand(len(ids), 3) + 1, torch.rand(3, net.numel) + 1
    x[ids == 1, 0] = torch.inf
    y = torch.ops.hyperfast.task_mlp(x, weight, None, ids, net.text)
    assert torch.equal(y.isinf().all(1), ids == 1)
    assert y[ids != 1].isfinite().all()


@pytest.mark.parametrize("bad", [-1, 3])
def test_ids_of_networks_out_of_range(bad):
    sizes, net = (3, 4, 2), text((3, 4, 2), "relu")
    args = random(sizes, 3, 2, 3, ragged=True, grad=False)
    x, weight, ids = stored(sizes, 3, 2, ragged=True)
    args[4][1] = ids[1] = bad
    with pytest.raises(IndexError, match=rf"\[0, 3\), got {bad}"):
        torch.ops.hyperfast.hyper_mlp(*args, net, False)
    with pytest.raises(IndexError, match=rf"\[0, 3\), got {bad}"):
        torch.ops.hyperfast.task_mlp(x, weight, None, ids, net)


@pytest.mark.parametrize("name", ["x", "h", "weight", "bias"])
def test_shapes_and_dtypes_of_networks(name):
    net = text((3, 4, 2), "relu")
    n = ["x", "h", "weight", "bias"].index(name)
    args = random((3, 4, 2), 3, 2, 3, grad=False)
    good, args[n] = args[n], args[n][..., 1:]
    with pytest.raises(ValueError, match="weight" if name == "h" else name):
        torch.ops.hyperfast.hyper_mlp(*args, net, False)
    args[n] = good.float()
    with pytest.raises(TypeError, match="dtype"):
        torch.ops.hyperfast.hyper_mlp(*args, net, False)
    args[n] = good
    hidden, grad = torch.randn(24, dtype=FP64), torch.randn(3, 2, 2, dtype=FP64)
    for name, given in {
        "preactivations": (grad, hidden[1:]),
        "grad": (grad[..., 1:], hidden),
    }.items():
        with pytest.raises(ValueError, match=name):
            torch.ops.hyperfast.hyper_mlp_backward(
                given[0], *args, given[1], net, [True, True, True, True]
            )


def test_shapes_and_dtypes_of_stored_networks():
    x, weight, ids = stored((3, 4, 2), 3, 2, ragged=True)
    options = ids, text((3, 4, 2), "relu")
    steps, affine = weight[:, 6:].to(torch.int8), weight[:, :12]
    for told, (given, error) in {
        "x": ((x[:, 1:], weight, None), ValueError),
        "weight": ((x, weight[:, 1:], None), ValueError),
        "scales_and_biases": ((x, steps, affine[:, 1:]), ValueError),
        "dtype": ((x.float(), weight, None), TypeError),
        "scales_and_biases must be of x's dtype": ((x.float(), steps, affine), TypeError),
    }.items():
        with pytest.raises(error, match=told):
            torch.ops.hyperfast.task_mlp(*given, *options)


def test_a_model_and_its_gradients(launched):
    hyper = hyperfast.HyperNet(3, 4, (5, 6), 2, target_activation="silu").double()
    model = hyperfast.HyperMLP(hyper)
    x, z = torch.randn(17, 4, dtype=FP64), torch.randn(4, 3, dtype=FP64)
    ids = torch.randint(4, (17,))
    y = model(x, z, ids)
    assert launched["_hyper_mlp"]
    gradients = torch.autograd.grad(y.square().sum(), list(model.parameters()))
    with hyperfast.use_backend("reference"):
        expected = model(x, z, ids)
        wanted = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    close(y, expected)
    close(gradients, wanted)


@pytest.mark.parametrize("how", ["transposed", "gaps", "contiguous"])
@pytest.mark.parametrize("size", [Sizes(5, 2, 3, 4, 6), Sizes(5, 2, 17, 70, 70)], ids=str)
def test_heads_read_from_a_copy(size, how, monkeypatch, launched):
    """Of few rows as of many: a layer, the gradient of its features, a network."""
    monkeypatch.setattr(trilinear, "PACK", 0)
    for name in ("hyper_linear", "hyper_linear_grad_h"):
        variant = Variant(name, True, plan="contract")
        args = variant.random(size)
        if how != "contiguous":
            args = [strided(a, how) if is_float(a) and a.ndim > 1 else a for a in args]
        close(variant.op(*args), variant.expected(*args))
    choose(monkeypatch, True)
    check_network(NETWORKS[0], "tanh,identity", False)
    assert launched["_pack"] >= 3


def test_offsets_beyond_32_bits(monkeypatch):
    """Rows, tasks and weights that lie 2^31 elements apart, in memory that is only reserved."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    far = 2**31

    def apart(*shape, far=far):
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
    close(
        hyper_linear(x, h, weight, None, target_bias=False, plan="contract"),
        reference.hyper_linear(x, h, weight.unflatten(0, (1, 3))),
        1e-5,
    )
    choose(monkeypatch, True)
    weight = apart(3, 2, far=far // 2)  # the product with a row's number leaves 32 bits
    for bias in (False, True):
        ins = 3 - bias
        args = apart(2, 1, ins), h, weight, None, None, text((ins, 1), "tanh", bias)
        close(torch.ops.hyperfast.hyper_mlp(*args, False)[0], expected(*args), 1e-5)
    w, ids = apart(3, 11, far=far // 2), torch.tensor([2, 0, 2])
    x, net = apart(3, 3), "3 > 2 b relu exp(W), 1 b"
    y = torch.ops.hyperfast.task_mlp(x, w, None, ids, net)
    close(y.double(), apply_stored(x, w, ids, net), 1e-5)
    given = apart(3, 1), x, w, ids, net, [True, True]
    close(torch.ops.hyperfast.task_mlp_backward(*given), networks._task_mlp_backward(*given), 1e-5)


def test_features_beyond_32_bits(monkeypatch):
    """Three features, the last 2^31 elements from the first."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)

    def apart(*shape):
        steps = *torch.empty(shape[:-1]).stride(), 2**30
        return torch.empty(2**31 + 4096).as_strided(shape, steps).copy_(torch.randn(shape))

    ops, ones = torch.ops.hyperfast, torch.ones
    g, x, h = apart(2, 1, 3), apart(2, 1, 3), apart(2, 3)
    close(
        ops.hyper_linear_grad_weight(g, x, h, None, False, "contract"),
        reference.hyper_linear_grad_weight(g, x, h, None, False),
        1e-5,
    )
    given = x, h, ones(3, 3, 3), None, ones(3, 3), apart(3), None, ""
    near = (a.contiguous() if is_float(a) else a for a in given)  # a library may err so far apart
    close(ops.hyper_linear(*given, "contract"), reference.hyper_linear(*near), 1e-5)
    w, b = apart(2, 3, 3), apart(2, 3)
    close(task_linear(x, w, b), reference.task_linear(x, w, b), 1e-5)
    choose(monkeypatch, False)
    w, scales = torch.randint(-9, 9, (2, 9), dtype=torch.int8), apart(2, 3)
    y = ops.task_mlp(x, w, scales, None, "3 > 3")
    want = reference.task_linear(x, w.view(2, 3, 3) * scales.unsqueeze(2))
    close(y, want, 1e-5)
