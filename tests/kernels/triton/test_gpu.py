"""The Triton kernels on a GPU, where there is one: all dtypes, graphs, compilation, memory.

What takes long to compile comes last, lest a limit on the time should hide the rest."""

import os
from functools import partial
from itertools import product

import pytest
import torch

import hyperfast
from hyperfast.bank.formats import format_of
from hyperfast.functional import hyper_linear, task_linear
from hyperfast.kernels import reference
from hyperfast.ops import network as networks
from hyperfast.plans import gpu
from tests.support.budget import assert_as_good, close, norm
from tests.support.cases import (
    FUSED,
    PAIRED,
    VARIANTS,
    Sizes,
    Variant,
    every_fused,
    floats,
    is_float,
)
from tests.support.networks import (
    expected,
    expected_stored,
    random,
    random_for,
    stored,
    stored_for,
    text,
)

pytest.importorskip("triton")
from hyperfast.kernels.triton import direct

# Deterministic algorithms, which the poison needs, ask this of the library of matrix products.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.usefixtures("nan_poison"),
]

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LARGE = [
    Sizes(1000, 1, 128, 128, 64),
    Sizes(300, 3, 63, 17, 129),
    Sizes(7, 100, 17, 129, 3),
    Sizes(64, 16, 2, 32, 128),
]
FEW = [Sizes(), Sizes(63, 1, 3, 3, 1), Sizes(tasks=0), Sizes(rows=0)]
# Each size and dtype is a compilation, a third of a second: hence no more.
STORED = [v for v in PAIRED if v.plan in ("tile", "materialize")]
TRANSFORMED = [v for v in VARIANTS if v.transform and v.plan in ("", "tile")]


in_norm = partial(assert_as_good, size=norm)


def to(args, device="cuda", dtype=None):
    return [
        a.to(device, dtype if dtype and is_float(a) else None) if isinstance(a, torch.Tensor) else a
        for a in args
    ]


@pytest.fixture
def model():
    hyper = hyperfast.HyperNet(8, 16, (32, 24), 4, hidden=(32,))
    return hyperfast.HyperMLP(hyper).cuda()


def batch(ragged, tasks=200, rows=3):
    z = torch.randn(tasks, 8, device="cuda")
    if not ragged:
        return torch.randn(tasks, rows, 16, device="cuda"), z
    ids = torch.randint(tasks, (tasks * rows,), device="cuda")
    return torch.randn(tasks * rows, 16, device="cuda"), z, ids


@pytest.mark.parametrize("ragged", [False, True])
def test_a_graph_captures_and_replays(model, ragged):
    """Nothing in a call waits for the device; new inputs, ids too, take effect at a replay."""
    inputs, fresh = batch(ragged), batch(ragged)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model(*inputs)  # compiles the kernels
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(*inputs)
        for old, new in zip(inputs, fresh, strict=True):
            old.copy_(new)
        graph.replay()
        assert torch.equal(y, model(*fresh))


def test_a_graph_of_stored_networks():
    x, weight, ids = (t.cuda() for t in stored((16, 32, 4), 50, 3, ragged=True))
    args = x.float(), weight.float(), None, ids, text((16, 32, 4), "relu")
    torch.ops.hyperfast.task_mlp(*args)  # compiles the kernel
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = torch.ops.hyperfast.task_mlp(*args)
    args[0].normal_()
    ids.copy_(ids.flip(0))
    graph.replay()
    assert torch.equal(y, torch.ops.hyperfast.task_mlp(*args))


@pytest.fixture
def no_waiting():
    """Whatever waits for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


SPEC = hyperfast.MLPSpec((16, 32, 4))
ASKED = {
    "uniform": lambda rows: torch.randint(500, (rows,)),
    "distinct": lambda rows: torch.randperm(500).repeat(rows // 500 + 1)[:rows],
    "identical": lambda rows: torch.full((rows,), 7),
}


def make_bank(dtype=torch.float32):
    flat = torch.randn(500, SPEC.numel, device="cuda") / 4
    return hyperfast.TaskBank.from_weights(SPEC, flat, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("rows", [3, 900, 70_000])
def test_a_bank_reads_nothing_back(dtype, rows, request):
    """Whoever is asked for; in order, and after a change. Its answers are those of a CPU's."""
    bank = make_bank(dtype)
    asked = [ask(rows).cuda() for ask in ASKED.values()]
    x = torch.randn(rows, 16, device="cuda")
    bank(x, asked[0])  # compiles
    bank.update([3], weights=torch.randn(1, SPEC.numel, device="cuda"))
    torch.cuda.synchronize()
    request.getfixturevalue("no_waiting")
    found = [bank(x, ids) for ids in asked]
    torch.cuda.set_sync_debug_mode("default")
    bank.check()
    for ids, y in zip(asked, found, strict=True):
        weights = SPEC.split(bank.weights(ids).double())
        exact = hyperfast.TargetNet()(x.double().unsqueeze(1), weights).squeeze(1)
        close(y.double(), exact, 0.05 if dtype == torch.bfloat16 else 1e-4)


def test_a_bank_tells_later_of_an_id_that_is_not_there():
    bank, x = make_bank(), torch.randn(3, 16, device="cuda")
    ids = torch.tensor([4, 500, -1], device="cuda")
    y = bank(x, ids)
    assert y[0].isfinite().all()
    assert y[1:].isnan().all()
    with pytest.raises(IndexError, match=r"no task of the bank has the id (500|-1), of an"):
        bank.check()
    bank.check()
    bank(x, ids)
    torch.cuda.synchronize()
    with pytest.raises(IndexError, match="of an earlier call"):
        bank(x, ids[:1].expand(3))


def test_a_graph_of_a_bank():
    """New rows and ids take effect at a replay, and so do changes; what the bank has left finds
    nobody."""
    bank, x = make_bank(), torch.randn(900, 16, device="cuda")
    ids = torch.randint(500, (900,), device="cuda")
    bank(x, ids)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = bank(x, ids)
    x.normal_()
    ids.copy_(ids.flip(0))
    bank.update([7], weights=torch.randn(1, SPEC.numel, device="cuda"))
    graph.replay()
    assert torch.equal(y, bank(x, ids))
    bank.check()
    ids[0] = 500
    graph.replay()
    assert y[0].isnan().all()
    with pytest.raises(IndexError, match="has the id 500, of an earlier call"):
        bank.check()
    bank.add(weights=torch.randn(5000, SPEC.numel, device="cuda"))
    graph.replay()
    assert y.isnan().all()
    with pytest.raises(IndexError, match="the bank grew after a graph was captured"):
        bank.check()
    assert bank(x, ids).isfinite().all()


def test_a_training_step_waits_for_nothing(model, request):
    inputs = batch(True)
    for _ in range(2):
        gradients = torch.autograd.grad(model(*inputs).square().sum(), list(model.parameters()))
        torch.cuda.synchronize()
        request.getfixturevalue("no_waiting")  # once the kernels are compiled
    torch.cuda.set_sync_debug_mode("default")
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ins", [1, 17, 64])
def test_sums_of_a_hot_task(ins, dtype):
    """70,000 rows, of which one task has nearly all: in parts, the same bits every time."""
    ids = torch.randint(9, (70_000,), device="cuda")
    ids[100:-300] = 4
    grad, x = (torch.randn(70_000, n, device="cuda", dtype=dtype) for n in (33, ins))
    op = torch.ops.hyperfast.task_linear_grad_weight
    plain, exact = (
        torch.stack([grad[ids == t].to(at).mT @ x[ids == t].to(at) for t in range(9)])
        for at in (dtype, torch.float64)
    )
    y = op(grad, x, ids, 9)
    in_norm(y, plain, exact)
    assert torch.equal(op(grad, x, ids, 9), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(model, dtype):
    x, z = batch(False)
    with torch.autocast("cuda", dtype):
        y = model(x, z)
    assert y.dtype == dtype
    close(y.float(), model(x, z), 0.1)


def test_fused_backend_is_what_runs(model):
    x, z = batch(False)
    with hyperfast.use_backend("triton"):
        y = model(x, z)
    assert torch.equal(y, model(x, z))
    with hyperfast.use_backend("reference"):
        close(model(x, z), y, 1e-4)


def test_contract_stores_no_weights():
    """Memory does not grow with the number of tasks times that of parameters."""
    tasks, ins, out = 4096, 64, 64
    x, h = torch.randn(tasks, 1, ins, device="cuda"), torch.randn(tasks, 64, device="cuda")
    weight = torch.randn(out * ins + out, 64, device="cuda")
    hyper_linear(x, h, weight, None, plan="contract")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    hyper_linear(x, h, weight, None, plan="contract")
    extra = torch.cuda.max_memory_allocated() - before
    parts = 2 * gpu.PARTS[gpu.SPLIT["fp32"]] * (weight.numel() + h.numel())
    assert extra < parts + 2 * x.numel() * 4
    assert extra < tasks * weight.shape[0] * 4 / 100


def test_nan_stays_with_its_task():
    x, w = torch.randn(43, 3, device="cuda"), torch.randn(5, 4, 3, device="cuda")
    ids = torch.arange(43, device="cuda") ** 2 % 5  # unevenly many: blocks of rows mix tasks
    expected = reference.task_linear(x, w, None, ids)
    w[1] = torch.inf
    y = task_linear(x, w, None, ids)
    close(y[ids != 1], expected[ids != 1], 1e-5)
    assert not y[ids == 1].isfinite().any()


def test_a_row_does_not_depend_on_its_neighbours():
    x, h = torch.randn(500, 33, device="cuda"), torch.randn(90, 20, device="cuda")
    weight, w = torch.randn(34 * 17, 20, device="cuda"), torch.randn(90, 17, 33, device="cuda")
    ids, shuffle = torch.randint(90, (500,), device="cuda"), torch.randperm(500, device="cuda")
    for layer in (
        lambda x, ids: hyper_linear(x, h, weight, None, ids, plan="contract"),
        lambda x, ids: task_linear(x, w, None, ids),
    ):
        assert torch.equal(layer(x[shuffle], ids[shuffle]), layer(x, ids)[shuffle])


@pytest.mark.parametrize("tasks", [1000, 10000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_precision_follows_pytorch(dtype, tasks):
    """fp32 loses digits where PyTorch may, and only there: it keeps 24 bits, 16, or 8; of little
    work those of TF32, 11."""
    variant = Variant("hyper_linear", False, plan="contract")
    args = to(variant.random(Sizes(tasks, 1, 128, 128, 64), dtype=dtype))
    errors = {}
    exact = variant.expected(*to(args, dtype=torch.float64))
    try:
        for precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            errors[precision] = (variant.op(*args).double() - exact).abs().max() / exact.abs().max()
    finally:
        torch.set_float32_matmul_precision("highest")
    highest, high, medium = errors.values()
    if dtype == torch.float32 and tasks == 1000:
        assert highest < 1e-6
        assert 1e-5 < high == medium < 1e-2
    elif dtype == torch.float32:
        assert highest < 1e-6 < high < 1e-4 < medium < 2e-2
    else:
        assert highest == high == medium


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *product(("hyper_linear", "hyper_linear_grad_h"), gpu.PARTS),
        ("hyper_linear_grad_weight", "bf16x6"),  # the others are TF32
    ],
)
def test_parts_of_what_is_not_finite(name, way, monkeypatch):
    """Infinite and NaN in the same places as in plain fp32."""
    variant = Variant(name, False, False, False, plan="contract")
    args = to(variant.random(Sizes(300, 1, 64, 64, 32), dtype=torch.float32))
    for a in floats(args):
        a.view(-1)[[5, -2]] = torch.inf
        a.view(-1)[777] = torch.nan
        a.view(-1)[::7] = 0
    found = []
    for products in ("fp32", way):
        monkeypatch.setattr(gpu, "products", lambda *_, products=products: products)
        found.append(variant.op(*args))
    plain, y = found
    assert plain.isinf().any() or plain.isnan().any()
    assert torch.equal(y.isnan(), plain.isnan())
    assert torch.equal(y.isinf(), plain.isinf())
    assert torch.equal(y[y.isinf()], plain[plain.isinf()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("ins", [10, 100])
def test_an_infinity_in_a_layer_that_fills_no_tile(ins, dtype):
    shapes = (300, 1, ins), (300, 20), (30, ins, 20)
    x, h, matrix = (torch.rand(s, dtype=dtype, device="cuda") + 1 for s in shapes)
    x[1, 0, 0] = x[2, 0, -1] = h[3, 0] = torch.inf
    y = torch.ops.hyperfast.hyper_linear(x, h, matrix, None, None, None, None, "", "contract")
    assert y[1:4].isinf().all()
    assert y[4:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_launches_past_triton(dtype, monkeypatch):
    """The same bits as by Triton; on a stream of its own, too, and on every device."""
    if direct.WHY_NOT:
        pytest.skip(direct.WHY_NOT)
    variant = Variant("hyper_linear", True, plan="contract")
    for device in range(torch.cuda.device_count()):
        args = to(variant.random(Sizes(50, 3, 17, 30, 16), dtype=dtype), f"cuda:{device}")
        with torch.cuda.stream(torch.cuda.Stream(device)):
            first, again = variant.op(*args), variant.op(*args)
            with monkeypatch.context() as patch:
                patch.setattr(direct, "WHY_NOT", "to compare")
                by_triton = variant.op(*args)
        torch.cuda.synchronize(device)
        assert torch.equal(first, by_triton)
        assert torch.equal(again, by_triton)


@pytest.mark.parametrize("scales", [(1e-37, 1e30), (1e-42, 1e34), (1e34, 1e-40)])
def test_parts_of_small_and_large_numbers(scales, monkeypatch):
    """Subnormal parts count, as subnormal numbers do."""
    monkeypatch.setattr(gpu, "products", lambda *_: "bf16x6")
    variant = Variant("hyper_linear", False, False, False, plan="contract")
    args = list(to(variant.random(Sizes(300, 1, 64, 64, 32), dtype=torch.float32)))
    args[1], args[2] = args[1] * scales[0], args[2] * scales[1]
    exact = variant.expected(*to(args, dtype=torch.float64))
    assert_as_good(variant.op(*args), variant.expected(*args), exact)


def test_fp16_does_not_overflow():
    """Products of inputs and features would, but no weight does, nor any output."""
    x, h = torch.full((300, 1, 64), 300.0).half(), torch.full((300, 32), 300.0).half()
    weight = torch.full((48 * 64, 32), 1e-5).half()
    x, h, weight = (t.cuda() for t in (x, h, weight))
    y = hyper_linear(x, h, weight, None, target_bias=False, plan="contract")
    exact = reference.hyper_linear(x.double(), h.double(), weight.double().unflatten(0, (48, 64)))
    assert_as_good(y, exact.half(), exact)
    given = x, x, h / 1e7  # pairs of inputs and gradients would, too
    y = torch.ops.hyperfast.hyper_linear_grad_weight(*given, None, False, "contract")
    exact = reference.hyper_linear_grad_weight(*(t.double() for t in given), None, False)
    assert_as_good(y, exact.half(), exact)


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [*product(LARGE, DTYPES[1:3]), (LARGE[1], torch.float64), (LARGE[1], torch.float16)],
    ids=str,
)
@every_fused
def test_value(variant, sizes, dtype):
    args = to(variant.random(sizes, dtype=dtype))
    exact = variant.expected(*to(args, dtype=torch.float64))
    assert_as_good(variant.op(*args), variant.expected(*args), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", LARGE, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("variant", [v for v in TRANSFORMED if not v.plan], ids=str)
def test_transforms(variant, sizes, dtype):
    """Value and every gradient."""
    given = to(variant.random(sizes, dtype=dtype))

    def run(function, at):
        args = [a.to(at).requires_grad_() if is_float(a) else a for a in given]
        y = function(*args)
        return y, *torch.autograd.grad(y.sum(), floats(args))

    plain, exact = run(variant.expected, dtype), run(variant.expected, torch.float64)
    for a, b, c in zip(run(variant.op, dtype), plain, exact, strict=True):
        in_norm(a, b, c)


# sizes of the network, tasks, rows a task, features, activations
NETWORKS = [
    ((64, 64, 10), 9000, 1, 64, "relu,identity"),
    ((2, 64, 33, 1), 700, 3, 17, "sin:3.0,tanh,identity"),
    ((8, 32, 1), 64, 1, 20, "elu,sigmoid"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_networks_in_one_kernel_and_by_layers(network, ragged, dtype, monkeypatch):
    """Value and every gradient; without the head's bias, of a size that amplifies rounding."""
    *size, activations = network
    given = to(random(*size, ragged=ragged, bias=False, grad=False))
    net = text(size[0], activations)

    def run(function, at):
        args = [a.to(at).requires_grad_() if is_float(a) else a for a in given]
        y = function(*args, net)
        return y, *torch.autograd.grad(y.sum(), [a for a in args if is_float(a)])

    given = [a.to(dtype) if is_float(a) else a for a in given]
    plain, exact = run(expected, dtype), run(expected, torch.float64)
    for whole in (False, True):
        monkeypatch.setattr(gpu, "one_kernel", lambda *args, whole=whole: whole)
        ours = run(lambda *a: torch.ops.hyperfast.hyper_mlp(*a, True)[0], dtype)
        again = run(lambda *a: torch.ops.hyperfast.hyper_mlp(*a, True)[0], dtype)
        for a, b, c, d in zip(ours, plain, exact, again, strict=True):
            in_norm(a, b, c)
            assert torch.equal(a, d)


# Transforms, and biases in some layers: network, tasks, rows a task.
MIXED = [
    ("64 > 64 b elu abs(W), 1", 3000, 1),
    ("16 > 33 elu exp(W), 20 b tanh, 2 b softplus(W)", 300, 7),
    ("8 > 10 b square(W)", 40, 70),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("network", MIXED, ids=str)
def test_transforms_and_mixed_biases(network, ragged, dtype):
    """Generated and stored: value and every gradient."""
    net, *size = network
    args = random_for(net, *size, 20, ragged=ragged, grad=False)
    x, weight, ids = stored_for(net, *size, ragged=ragged, scale=0.2)

    def compare(ours, plain, given):
        given = to(given, dtype=dtype)

        def run(function, at):
            args = [a.to(at).requires_grad_() if is_float(a) else a for a in given]
            y = function(*args, net)
            return y, *torch.autograd.grad(y.sum(), floats(args))

        wanted = run(plain, dtype), run(plain, torch.float64)
        for a, b, c in zip(run(ours, dtype), *wanted, strict=True):
            in_norm(a, b, c)

    compare(lambda *a: torch.ops.hyperfast.hyper_mlp(*a, True)[0], expected, args)
    compare(
        lambda x, w, *rest: torch.ops.hyperfast.task_mlp(x, w, None, *rest),
        expected_stored,
        [x, weight, ids],
    )


def plain_stored(x, weight, scales, ids, network):
    return networks.by_task_layers(x, weight, scales, ids, network, reference.task_linear)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8], ids=str)
@pytest.mark.parametrize("rows", [1, 40])
def test_stored_networks(dtype, rows, monkeypatch):
    sizes = 64, 64, 10
    x, weight, ids = stored(sizes, 300, rows, ragged=True)
    weight, scales = weight / 8, None
    if dtype == torch.int8:
        weight, scales = format_of(hyperfast.MLPSpec(sizes), dtype).encode(weight)
    kind = torch.float32 if scales is not None else dtype
    x, ids = x.to("cuda", kind), ids.cuda()
    weight, scales = weight.to("cuda", dtype), None if scales is None else scales.cuda()
    options = ids, text(sizes, "silu")
    plain = plain_stored(x, weight, scales, *options)
    exact = [t if t is None or t.dtype == torch.int8 else t.double() for t in (weight, scales)]
    exact = plain_stored(x.double(), *exact, *options)
    for whole in (False, True):
        monkeypatch.setattr(gpu, "fits_one_kernel", lambda sizes, whole=whole: whole)
        in_norm(torch.ops.hyperfast.task_mlp(x, weight, scales, *options), plain, exact)


@pytest.mark.parametrize("sizes", FEW, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("variant", [*FUSED, *TRANSFORMED], ids=str)
def test_gradients(variant, sizes):
    args = to(variant.random(sizes))
    args = [a.requires_grad_() if is_float(a) else a for a in args]
    leaves = [a for a in args if is_float(a)]
    expected = variant.expected(*args)
    weight = torch.randn_like(expected)
    y = variant.op(*args)
    close(y, expected)
    close(torch.autograd.grad(y, leaves, weight), torch.autograd.grad(expected, leaves, weight))


@pytest.mark.parametrize("variant", STORED, ids=str)
def test_value_by_stored_weights(variant):
    args = to(variant.random(LARGE[1]))
    close(variant.op(*args), variant.expected(*args))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_every_time(dtype, ragged):
    """No order of summation is left to chance, and rows do not depend on their neighbours."""
    for variant in (v for v in [*FUSED, *TRANSFORMED] if v.ragged == ragged):
        args = to(variant.random(Sizes(500, 3, 33, 17, 20), dtype=dtype))
        first = variant.op(*args)
        assert all(torch.equal(variant.op(*args), first) for _ in range(3))


@pytest.mark.filterwarnings("ignore")  # the compiler's own advice
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("mode", ["default", "max-autotune"])
def test_compiles_in_one_graph(model, ragged, mode, dynamo):
    torch.use_deterministic_algorithms(False)  # max-autotune's choice of products is not
    inputs = batch(ragged)
    expected = model(*inputs)
    gradients = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    y = torch.compile(model, fullgraph=True, mode=mode)(*inputs)
    close(y, expected, 1e-3)
    close(torch.autograd.grad(y.square().sum(), list(model.parameters())), gradients, 1e-2)


def test_ids_out_of_range_trap():
    """A device-side assertion, as of PyTorch's own indexing; it ends a process, hence another."""
    import subprocess
    import sys

    code = """
import torch
from hyperfast.functional import task_linear
ids = torch.tensor([0, 5], device="cuda")
task_linear(torch.randn(2, 3, device="cuda"), torch.randn(5, 2, 3, device="cuda"), None, ids)
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "task_ids out of range" in done.stdout + done.stderr
