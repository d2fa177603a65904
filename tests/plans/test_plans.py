"""The choice of plan: pure functions of sizes."""

from functools import partial
from itertools import pairwise

import pytest
import torch

import hyperfast
from hyperfast.plans import choose as plan
from hyperfast.plans.choose import PLANS, Layer

LAYERS = [
    Layer(1, 1, 1, 1, 1),
    Layer(512, 512, 128, 128, 128),
    Layer(512, 32768, 128, 128, 128),
    Layer(16, 65536, 2, 64, 256),
    Layer(256, 16384, 2, 32, 128, ragged=True),
    Layer(0, 0, 3, 3, 3),
    Layer(3, 0, 3, 3, 3, bias=False),
    Layer(20000, 4096, 64, 64, 64, ragged=True),
]
DEVICE = plan.device_key("cpu", torch.float32)
every_layer = pytest.mark.parametrize("layer", LAYERS, ids=str)


@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu"])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
@every_layer
def test_choose_takes_the_cheapest(layer, itemsize, device):
    table = plan.costs(layer, itemsize, device)
    assert tuple(table) == PLANS
    best = plan.choose(layer, itemsize, device)
    assert table[best].seconds == min(c.seconds for c in table.values())
    assert best == plan.choose.__wrapped__(layer, itemsize, device)


@every_layer
def test_costs_are_sane(layer):
    for name, cost in plan.costs(layer, 4).items():
        assert cost.plan == name
        assert min(cost.flops, cost.bytes, cost.extra_bytes) >= 0
        assert cost.seconds >= 0


def test_flops_of_materialize():
    """Generation and application, two FLOPs a multiply-add."""
    b, n, i, o, k = 7, 5, 3, 4, 6
    p = o * i + o
    assert plan.costs(Layer(b, b * n, i, o, k), 4)["materialize"].flops == 2 * b * p * (k + n)


def test_many_rows_a_task_do_not_contract():
    assert plan.choose(Layer(512, 512 * 256, 128, 128, 128), 4) != "contract"


def test_materialize_stores_the_weights_and_the_others_do_not():
    layer = Layer(4096, 4096, 128, 128, 64)
    table = plan.costs(layer, 4)
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
        ((64, 4), (64, 5), False, 64),
        ((100, 4), (64, 5), True, 100),
        ((0, 4), (0, 5), False, 0),
    ],
)
def test_explain_totals(model, x_shape, z_shape, ragged, rows):
    table = hyperfast.explain(model, x_shape, z_shape, ragged=ragged)
    assert [name for name, _ in table.layers] == ["4 -> 8", "8 -> 6", "6 -> 3"]
    for (_, cost), layer in zip(table.layers, model.hyper.spec.layers, strict=True):
        sizes = Layer(z_shape[0], rows, layer.in_features, layer.out_features, 64, ragged)
        assert cost == plan.costs(sizes, 4, DEVICE)[plan.choose(sizes, 4, DEVICE)]
    *_, total = str(table).splitlines()
    name, flops, moved, extra = total.split()
    assert name == "total"
    costs = [c for _, c in table.layers]
    assert float(flops) == pytest.approx(sum(c.flops for c in costs) / 1e6, abs=5e-4)
    assert float(moved) == pytest.approx(sum(c.bytes for c in costs) / 1e6, abs=5e-4)
    assert float(extra) == pytest.approx(max(c.extra_bytes for c in costs) / 1e6, abs=5e-4)


def test_explain_sees_dtype(model):
    table = hyperfast.explain(model.double(), (64, 10, 4), (64, 5))
    assert "float64 on cpu" in str(table)
    sizes = Layer(64, 640, 4, 8, 64)
    assert table.layers[0][1] == plan.costs(sizes, 8, DEVICE)[plan.choose(sizes, 8, DEVICE)]


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
    layer = Layer(tasks, rows, ins, 17, 65, ragged)
    assert plan.choose(layer, 4, "cpp") == name

    def run(chosen):
        bias = torch.linspace(-1, 1, len(weight))
        return torch.ops.hyperfast.hyper_linear(x, h, weight, bias, ids, True, chosen)

    same = [p for p in PLANS if torch.equal(run(p), run(""))]
    assert name in same
    assert len(same) < len(PLANS)


@pytest.mark.skipif(DEVICE != "cpp", reason="no extension")
@pytest.mark.parametrize(
    ("tasks", "rows", "ins", "features"),
    [
        (512, 512, 15, 33),
        (512, 4096, 15, 32),
        (512, 512, 15, 31),
        (511, 511, 15, 33),
        (512, 4608, 15, 33),
    ],
)
def test_16_bit_heads_contract_where_a_matrix_unit_does_it(tasks, rows, ins, features):
    from hyperfast import _C

    layer = Layer(tasks, rows, ins, 16, features)
    unit = _C.isa() == "amx" and tasks == 512 and rows <= 8 * tasks and features > 31
    name = plan.choose(layer, 2, "cpp")
    assert name == ("contract" if unit else "tile")
    # What the first features add, the others take away: roundings in fp32 are left.
    x, h = torch.randn(tasks, rows // tasks, ins), torch.randn(tasks, features // 2 + 1)
    weight = torch.randn(layer.params, features // 2 + 1)
    h, weight = torch.cat([h, -h], 1)[:, -features:], torch.cat([weight] * 2, 1)[:, -features:]
    h[:, features // 2], weight[:, features // 2] = 0, 0
    args = [t.bfloat16() for t in (x, h, weight)]
    run = partial(torch.ops.hyperfast.hyper_linear, *args, None, None, True)
    same = [p for p in PLANS if torch.equal(run(p), run(""))]
    assert name in same
    if _C.isa() in ("amx", "avx512_bf16"):  # others add up the same floats in the same order
        assert len(same) < len(PLANS)


def test_explain_shows_what_the_cpu_runs():
    model = hyperfast.HyperMLP(hyperfast.HyperNet(5, 64, 64, 10))
    assert (DEVICE == "cpp") == hyperfast.ops.backends.has_kernel("cpp", "hyper_linear")
    if DEVICE == "cpu":
        pytest.skip("no extension")
    plans = {
        b: {c.plan for _, c in hyperfast.explain(model, (b, 64), (b, 5)).layers} for b in (4, 17)
    }
    assert plans == {4: {"materialize"}, 17: {"contract"}}


def network(sizes, tasks, rows, features=64):
    return tuple(Layer(tasks, rows, i, o, features) for i, o in pairwise(sizes))


@pytest.mark.parametrize("device", ["half", "tf32"])
def test_one_kernel_for_narrow_networks_of_many_tasks(device):
    many = 65536
    assert plan.one_kernel(network((2, 32, 32, 1), many, many), 2, device)
    assert not plan.one_kernel(network((2, 32, 65, 1), many, many), 2, device)
    assert not plan.one_kernel(network((2, *[32] * 4, 1), many, many), 2, device)
    assert not plan.one_kernel(network((2, 32), many, many), 2, device)
    # Rows that fill few multiprocessors, rows that make stored weights pay, and none.
    assert not plan.one_kernel(network((64, 64, 64), 512, 512), 2, device)
    assert not plan.one_kernel(network((64, 64, 64), 64, 64 * 4096), 2, device)
    assert not plan.one_kernel(network((2, 32, 1), 3, 0), 2, device)


def test_a_narrow_side_is_looped_over():
    assert plan.loop(Layer(9, 9, 2, 64, 64), True) == "input"
    assert plan.loop(Layer(9, 9, 2, 64, 64), False) == "feature"
    assert plan.loop(Layer(9, 9, 64, 1, 64), False) == "output"
    assert plan.loop(Layer(9, 9, 64, 64, 64), True) == "feature"
    assert plan.loop(Layer(9, 9, 64, 64, 1), False) == "feature"


def test_explain_tells_of_one_kernel(model, monkeypatch):
    monkeypatch.setattr(plan, "device_key", lambda device, dtype: "half")
    assert "in one kernel" in str(hyperfast.explain(model, (65536, 4), (65536, 5)))
    assert "in one kernel" not in str(hyperfast.explain(model, (8, 1 << 20, 4), (8, 5)))
