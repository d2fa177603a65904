"""The choice of plan: pure functions of sizes."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch

import hyperfast
from hyperfast.layout import Generated
from hyperfast.ops.network import by_layers
from hyperfast.plans import choose as plan
from hyperfast.plans import explain, gpu
from hyperfast.plans.cpu import EXTENSION, runs_whole
from hyperfast.plans.sizes import PLANS, Sizes

LAYERS = [
    Sizes(1, 1, 1, 1, 1),
    Sizes(512, 512, 128, 128, 128),
    Sizes(512, 32768, 128, 128, 128),
    Sizes(16, 65536, 2, 64, 256),
    Sizes(256, 16384, 2, 32, 128, ragged=True),
    Sizes(0, 0, 3, 3, 3),
    Sizes(3, 0, 3, 3, 3, bias=False),
    Sizes(20000, 4096, 64, 64, 64, ragged=True),
]
FP32 = torch.float32
DEVICE = plan.device_key("cpu", FP32)
every_layer = pytest.mark.parametrize("layer", LAYERS, ids=str)


@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@every_layer
def test_choose_takes_the_cheapest(layer, dtype, device):
    table = plan.costs(layer, dtype, device)
    assert tuple(table) == PLANS
    best = plan.choose(layer, dtype, device)
    assert table[best].seconds == min(c.seconds for c in table.values())
    assert best == plan.choose.__wrapped__(layer, dtype, device)


@every_layer
def test_costs_are_sane(layer):
    for name, cost in plan.costs(layer, FP32).items():
        assert cost.plan == name
        assert min(cost.flops, cost.bytes, cost.extra_bytes) >= 0
        assert cost.seconds >= 0


def test_flops_of_materialize():
    """Generation and application, two FLOPs a multiply-add."""
    b, n, i, o, k = 7, 5, 3, 4, 6
    p = o * i + o
    assert plan.costs(Sizes(b, b * n, i, o, k), FP32)["materialize"].flops == 2 * b * p * (k + n)


def test_many_rows_a_task_do_not_contract():
    assert plan.choose(Sizes(512, 512 * 256, 128, 128, 128), FP32) != "contract"


def test_materialize_stores_the_weights_and_the_others_do_not():
    layer = Sizes(4096, 4096, 128, 128, 64)
    table = plan.costs(layer, FP32)
    weights = layer.tasks * layer.params * 4
    assert table["materialize"].extra_bytes == weights
    assert max(table["contract"].extra_bytes, table["tile"].extra_bytes) < weights / 10


@pytest.fixture
def model():
    return hyperfast.HyperMLP(hyperfast.HyperNet(5, 4, (8, 6), 3))


@pytest.mark.parametrize(
    ("x_shape", "z_shape", "ragged", "rows"),
    [
        ((64, 10, 4), (64, 5), False, 640),
        ((64, 100, 4), (64, 5), False, 6400),
        ((64, 4), (64, 5), False, 64),
        ((100, 4), (64, 5), True, 100),
        ((0, 4), (0, 5), False, 0),
    ],
)
def test_explain_totals(model, x_shape, z_shape, ragged, rows):
    table = hyperfast.explain(model, x_shape, z_shape, ragged=ragged)
    assert [name for name, _ in table.layers] == ["4 -> 8", "8 -> 6", "6 -> 3"]
    if not table.whole:
        for (_, cost), layer in zip(table.layers, model.hyper.spec.layers, strict=True):
            sizes = Sizes(z_shape[0], rows, layer.in_features, layer.out_features, 64, ragged)
            assert cost == plan.costs(sizes, FP32, DEVICE)[plan.choose(sizes, FP32, DEVICE)]
    *_, total = str(table).splitlines()
    name, flops, moved, extra = total.split()
    assert name == "total"
    costs = [c for _, c in table.layers]
    assert float(flops) == pytest.approx(sum(c.flops for c in costs) / 1e6, abs=5e-4)
    assert float(moved) == pytest.approx(sum(c.bytes for c in costs) / 1e6, abs=5e-4)
    together = sum if table.whole else max
    assert float(extra) == pytest.approx(together(c.extra_bytes for c in costs) / 1e6, abs=5e-4)


def test_explain_sees_dtype(model):
    table = hyperfast.explain(model.double(), (64, 10, 4), (64, 5))
    assert "float64 on cpu" in str(table)
    sizes, dtype = Sizes(64, 640, 4, 8, 64), torch.float64
    assert table.layers[0][1] == plan.costs(sizes, dtype, DEVICE)[plan.choose(sizes, dtype, DEVICE)]


RULE = [  # tasks, rows, inputs, ragged, and the plan in fp32, with 17 outputs and 65 features
    (1, 1, 1, False, "materialize"),
    (4, 4, 5, False, "tile"),
    (4, 4, 33, False, "materialize"),
    (5, 5, 33, False, "contract"),
    (5, 40, 33, False, "contract"),
    (5, 45, 33, False, "tile"),
    (16, 16, 64, False, "materialize"),
    (17, 17, 64, False, "contract"),
    (17, 17 * 48, 64, False, "materialize"),
    (65, 65 * 48, 64, False, "tile"),
    (40, 50, 33, True, "contract"),
    (40, 51, 33, True, "tile"),
    (40, 4, 33, True, "materialize"),
]


@pytest.mark.skipif(DEVICE != "cpp", reason="no extension")
@pytest.mark.parametrize(("tasks", "rows", "ins", "ragged", "name"), RULE)
def test_the_rule_is_what_the_kernels_do(tasks, rows, ins, ragged, name):
    """Left to itself, the op gives the bits of the plan that is explained; plans round differently,
    where not all three then at least one of them."""
    h, weight = torch.randn(tasks, 65), torch.randn(17 * (ins + 1), 65)
    x = torch.randn(rows, ins) if ragged else torch.randn(tasks, rows // tasks, ins)
    ids = torch.arange(rows) % min(tasks, rows) if ragged else None
    layer = Sizes(tasks, rows, ins, 17, 65, ragged)
    assert plan.choose(layer, FP32, "cpp") == name

    def run(chosen):
        bias = torch.linspace(-1, 1, len(weight))
        made = Generated.of_head(weight, bias, ins, True)
        return torch.ops.hyperfast.hyper_linear(x, h, *made, ids, "", chosen)

    same = [p for p in PLANS if torch.equal(run(p), run(""))]
    assert name in same
    assert len(same) < len(PLANS)


@pytest.mark.skipif(DEVICE != "cpp", reason="no extension")
@pytest.mark.parametrize(
    ("tasks", "rows", "ins", "features", "ragged"),
    [
        (512, 512, 15, 33, False),
        (512, 4096, 15, 32, False),
        (512, 512, 15, 31, False),
        (511, 511, 15, 33, False),
        (512, 4608, 15, 33, False),
        (511, 511 * 4, 63, 33, False),  # pairs of bf16: from 1,024 weights on, rows weigh more
        (511, 511 * 5, 63, 33, False),
        (511, 511 * 5, 62, 33, False),
        (800, 900, 63, 33, True),
        (800, 901, 63, 33, True),
        (800, 901, 62, 33, True),
    ],
)
def test_16_bit_heads_are_read_as_they_lie(tasks, rows, ins, features, ragged):
    layer = Sizes(tasks, rows, ins, 16, features, ragged)
    isa = EXTENSION.isa()
    unit = isa in ("amx", "amx_emulated") and tasks == 512 and features > 31
    pairs = isa == "avx512_bf16"
    few = 4 * rows <= 5 * tasks if ragged else rows <= 8 * tasks
    fewer = 8 * rows <= 9 * tasks if ragged else rows <= 4 * tasks
    name = plan.choose(layer, torch.bfloat16, "cpp")
    assert name == ("contract" if few and (fewer or not pairs or ins < 63) else "tile")
    assert plan.choose(layer, torch.float16, "cpp") == ("contract" if few else "tile")
    if ragged:
        return
    # What the first features add, the others take away: roundings in fp32 are left.
    x, h = torch.randn(tasks, rows // tasks, ins), torch.randn(tasks, features // 2 + 1)
    weight = torch.randn(layer.params, features // 2 + 1)
    h, weight = torch.cat([h, -h], 1)[:, -features:], torch.cat([weight] * 2, 1)[:, -features:]
    h[:, features // 2], weight[:, features // 2] = 0, 0
    # Likewise of the biases, from which sums start or in which they end, and the inputs.
    bias = torch.ones(layer.params)
    bias[16 * ins :] = 0
    x, h, weight, bias = (t.bfloat16() for t in (x - x.flip(-1), h, weight, bias))
    made = Generated.of_head(weight, bias, ins, True)
    run = partial(torch.ops.hyperfast.hyper_linear, x, h, *made, None, "")
    same = [p for p in PLANS if torch.equal(run(p), run(""))]
    assert name in same
    if pairs:
        assert same == [name]
    elif unit:  # others add up the same floats in the same order
        assert len(same) < len(PLANS)


@pytest.mark.skipif(DEVICE != "cpp", reason="no extension")
def test_explain_shows_what_the_cpu_runs():
    """By layers, or whole: for few tasks, and for many rows a task of a network that fits."""
    model = hyperfast.HyperMLP(hyperfast.HyperNet(5, 64, 64, 10))
    text = "64 > 64 b relu, 10 b"
    for tasks, rows, plans in ((4, 1, {"whole"}), (17, 1, {"contract"}), (256, 64, {"whole"})):
        shown = hyperfast.explain(model, (tasks, rows, 64), (tasks, 5))
        assert {c.plan for _, c in shown.layers} == plans
        assert shown.whole == runs_whole(text, FP32, False, tasks, tasks * rows, 64)


@pytest.mark.skipif(DEVICE != "cpp", reason="no extension")
@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "in_pairs"), [(15, False), (16, True), (47, True), (48, True)])
def test_pairs_of_bf16_run_whole_from_fewer_rows_on(rows, in_pairs, dtype):
    pairs = EXTENSION.isa() == "avx512_bf16" and dtype == torch.bfloat16
    whole = runs_whole("64 > 64 b relu, 10 b", dtype, False, 30, 30 * rows, 64)
    assert whole == (in_pairs if pairs else rows >= 48)


@pytest.mark.skipif(DEVICE != "cpp", reason="no extension")
@pytest.mark.parametrize(("tasks", "rows"), [(5, 1), (17, 8), (17, 47), (17, 48), (256, 64)])
def test_what_runs_whole_has_its_own_bits(tasks, rows):
    """Layers that run one by one give the bits of single layers; networks that run whole apply
    their weights in another order."""
    text = "64 > 64 b relu, 10 b"
    x, h = torch.randn(tasks, rows, 64), torch.randn(tasks, 64)
    head, bias = torch.randn(4810, 64) / 30, torch.randn(4810)
    one_by_one = by_layers(x, h, head, bias, None, text)
    y, _ = torch.ops.hyperfast.hyper_mlp(x, h, head, bias, None, text, False)
    whole = runs_whole(text, FP32, False, tasks, tasks * rows, 64)
    assert whole == (rows >= 48)
    assert torch.equal(y, one_by_one) != whole


def network(sizes, tasks, rows, features=64):
    return tuple(Sizes(tasks, rows, i, o, features) for i, o in pairwise(sizes))


@pytest.mark.parametrize("device", ["half", "fp32", "high", "medium"])
def test_one_kernel_for_narrow_networks_of_many_tasks(device):
    many = 65536
    assert gpu.one_kernel(network((2, 32, 32, 1), many, many), 2, device)
    assert not gpu.one_kernel(network((2, 32, 65, 1), many, many), 2, device)
    assert not gpu.one_kernel(network((2, *[32] * 4, 1), many, many), 2, device)
    assert not gpu.one_kernel(network((2, 32), many, many), 2, device)
    # Rows that fill few multiprocessors, rows that make stored weights pay, and none.
    assert not gpu.one_kernel(network((64, 64, 64), 512, 512), 2, device)
    assert not gpu.one_kernel(network((64, 64, 64), 64, 64 * 4096), 2, device)
    assert not gpu.one_kernel(network((2, 32, 1), 3, 0), 2, device)


@pytest.mark.parametrize("device", gpu.GPU)
def test_transformed_weights_are_stored_on_a_gpu(device):
    """Even one row a task; of few mixed rows as if each were a task, a block at a time."""
    layer = Sizes(4096, 4096, 64, 64, 64)
    assert plan.choose(layer, FP32, device) == "contract"
    transformed = layer._replace(transform=True)
    assert plan.choose(transformed, FP32, device) in ("tile", "materialize")
    few = transformed._replace(tasks=10**6, ragged=True)
    assert gpu.costs(few, 4, device) == gpu.costs(transformed, 4, device)
    assert gpu.costs(few._replace(rows=10**7), 4, device)["tile"].seconds == math.inf
    layers = network((2, 32, 32, 1), 65536, 65536)
    assert not gpu.one_kernel((*layers[:2], layers[2]._replace(transform=True)), 2, device)


def test_explain_tells_of_one_kernel(model, monkeypatch):
    monkeypatch.setattr(explain, "device_key", lambda device, dtype: "half")
    assert "in one kernel" in str(hyperfast.explain(model, (65536, 4), (65536, 5)))
    wide = hyperfast.HyperMLP(hyperfast.HyperNet(5, 64, 64, 10))
    assert "in one kernel" not in str(hyperfast.explain(wide, (8, 1 << 20, 64), (8, 5)))


@pytest.mark.parametrize("kind", gpu.SPLIT)
def test_numbers_are_split_where_it_pays(kind, monkeypatch):
    """For much work, which gains more than two launches and the parts' bytes take: else they are
    multiplied as PyTorch has it."""
    much, little = Sizes(4096, 8192, 128, 128, 64), Sizes(512, 512, 32, 32, 32)
    unit = "fp32" if kind == "fp32" else "tf32"
    assert gpu.split([much], kind) == gpu.SPLIT[kind]
    assert gpu.split([little], kind) is None
    assert gpu.split([much], "half") is gpu.split([much], "fp64") is None
    parts = gpu.PARTS[gpu.SPLIT[kind]] * 2 * (much.params + 4096) * 64
    assert gpu.costs(much, 4, kind)["contract"].extra_bytes == parts
    assert gpu.costs(little, 4, kind)["contract"].extra_bytes == 0
    # Slow launches, or a slow memory, make it pay later.
    work = 2 * 10**10, 10**6
    assert gpu._products(kind, *work, gpu.Machine(3e12, 1e-5))[0] == gpu.SPLIT[kind]
    assert gpu._products(kind, *work, gpu.Machine(3e12, 1e-3))[0] == unit
    assert gpu._products(kind, *work, gpu.Machine(1e10, 1e-5))[0] == unit


@pytest.fixture
def matmul():
    """The settings of PyTorch's products."""
    settings = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    yield settings
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    for each in settings:
        each.fp32_precision = "none"


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("of_cuda", ["", "ieee", "tf32"])
@pytest.mark.parametrize("of_cpu", ["", "ieee", "tf32", "bf16"])
def test_precision_is_that_of_pytorch(precision, of_cuda, of_cpu, matmul):
    """Set for all, and then for each: one bf16 is taken only where "medium" was asked for."""
    torch.set_float32_matmul_precision(precision)
    for setting, value in zip(matmul, (of_cuda, of_cpu), strict=True):
        if value:
            setting.fp32_precision = value
    kind = {"highest": "fp32"}.get(precision, precision)
    if of_cuda:
        kind = {"ieee": "fp32", "tf32": "high" if kind == "fp32" else kind}[of_cuda]
    if of_cpu in ("ieee", "tf32") and kind == "medium":  # taken back
        kind = "high"
    assert gpu.arithmetic(torch.float32) == kind
    assert gpu.unit(torch.float32) == ("fp32" if kind == "fp32" else "tf32")
    assert gpu.arithmetic(torch.float64) == gpu.unit(torch.float64) == "fp64"
    assert gpu.arithmetic(torch.bfloat16) == gpu.arithmetic(torch.float16) == "half"


def test_precision_of_all_backends_or_by_an_older_name(matmul):
    assert gpu.arithmetic(torch.float32) == "fp32"
    torch.backends.fp32_precision = "tf32"
    assert gpu.arithmetic(torch.float32) == "high"
    torch.backends.fp32_precision = "bf16"  # which CUDA's products do not know
    assert gpu.arithmetic(torch.float32) == "fp32"
    torch.backends.fp32_precision = "none"
    torch.backends.cuda.matmul.allow_tf32 = True
    assert gpu.arithmetic(torch.float32) == "high"


def test_explain_tells_of_parts(monkeypatch):
    narrow, wide = (hyperfast.HyperMLP(hyperfast.HyperNet(5, n, n, 10)) for n in (64, 128))
    for kind, name in gpu.SPLIT.items():
        monkeypatch.setattr(explain, "device_key", lambda device, dtype, kind=kind: kind)
        title = str(hyperfast.explain(narrow, (1 << 20, 64), (1 << 20, 5))).split("\n")[0]
        assert title.endswith(f", in one kernel, {name}")
        assert name in str(hyperfast.explain(wide, (1 << 16, 128), (1 << 16, 5)))
        assert name not in str(hyperfast.explain(wide, (9, 128), (9, 5)))


def test_figures_are_those_of_the_device(monkeypatch):
    """Of the current one, if it is known by its name; else an H100's."""
    assert gpu.machine() == gpu.MACHINES["H100"]
    names = ["NVIDIA H200", "NVIDIA H100 80GB HBM3", "Other"]
    layer, found = Sizes(64, 64 * 512, 512, 512, 8), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[device])
    for device, key in enumerate(("H200", "H100", "H100")):
        monkeypatch.setattr(torch.cuda, "current_device", lambda device=device: device)
        assert gpu.machine() == gpu.MACHINES[key]
        found.append(gpu.costs(layer, 2, "half")["materialize"].seconds)
    assert found[0] < found[1] == found[2]
    gpu._machine.cache_clear()


def test_launches_decide_where_little_is_done():
    """To make and use the weights a block at a time is not worth three launches each."""
    layer = Sizes(4096, 8 * 4096, 128, 128, 64)
    table = gpu.costs(layer, 2, "half")
    assert table["materialize"].seconds < table["tile"].seconds
