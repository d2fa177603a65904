"""The choice of plan: pure functions of sizes."""

import pytest
import torch

import hyperfast
from hyperfast import eager, ops, plan
from hyperfast.functional import hyper_linear
from hyperfast.plan import PLANS, Layer

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


def test_explain_is_what_runs(monkeypatch):
    """The C++ kernels are told the plan; in plain PyTorch the op chooses it."""
    op, choose, ran = ops.hyper_linear, plan.choose, []

    def told(*args):
        ran.append(args[-1])
        return op(*args)

    def chosen(*args):
        ran.append(choose(*args))
        return ran[-1]

    if DEVICE == "cpp":
        monkeypatch.setattr(ops, "hyper_linear", told)
    else:
        monkeypatch.setattr(eager, "choose", chosen)
    model = hyperfast.HyperMLP(hyperfast.HyperNet(5, 64, (64, 3), 3))
    explained = []
    for tasks in (1, 1024):
        model(torch.randn(tasks, 64), torch.randn(tasks, 5))
        table = hyperfast.explain(model, (tasks, 64), (tasks, 5))
        explained += [cost.plan for _, cost in table.layers]
    assert ran == explained
    assert DEVICE == "cpu" or set(ran) == {"tile", "materialize"}


def test_the_plan_is_left_to_the_op_where_sizes_are_not_the_whole(monkeypatch, dynamo):
    """A transform sees one call of many, a compiler symbols."""
    op, plans = ops.hyper_linear, []

    def record(*args):
        plans.append(args[-1])
        return op(*args)

    monkeypatch.setattr(ops, "hyper_linear", record)
    x, h, weight = torch.randn(7, 2, 3, 4), torch.randn(2, 5), torch.randn(6 * 5, 5)
    hyper_linear(x[0], h, weight, None)
    assert bool(plans.pop()) == (DEVICE == "cpp")
    torch.vmap(lambda x: hyper_linear(x, h, weight, None))(x)
    assert plans.pop() == ""
    torch.compile(hyper_linear, backend="eager", dynamic=True)(x[0], h, weight, None)
    assert plans == [""]


@pytest.mark.parametrize("tasks", [0, 1, 7, 64])
def test_task_blocks_cover_every_task_once(tasks, monkeypatch):
    monkeypatch.setattr(plan, "HIDDEN_MOST", 1000)
    monkeypatch.setattr(plan, "HIDDEN_BLOCK", 300)
    blocks = plan.task_blocks(tasks, rows=5, widest=5, itemsize=4)  # 100 bytes a task
    assert [t for block in blocks for t in range(tasks)[block]] == list(range(tasks))
    assert len(blocks) == (1 if tasks <= 10 else 22)
    assert len(plan.task_blocks(64, rows=100, widest=100, itemsize=4)) == 64


def test_model_without_gradients_runs_by_blocks(monkeypatch):
    monkeypatch.setattr(plan, "HIDDEN_MOST", 0)
    monkeypatch.setattr(plan, "HIDDEN_BLOCK", 2 * 3 * 8 * 8)  # two tasks
    calls, layers = [], hyperfast.HyperMLP._layers

    def counted(self, spec, target, x, h, ids):
        calls.append(len(x))
        return layers(self, spec, target, x, h, ids)

    monkeypatch.setattr(hyperfast.HyperMLP, "_layers", counted)
    model = hyperfast.HyperMLP(hyperfast.HyperNet(5, 4, 8, 3, dtype=torch.float64))
    x, z = torch.randn(7, 3, 4, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    whole = model(x, z)
    with torch.no_grad():
        by_blocks = model(x, z)
    assert calls == [7, 2, 2, 2, 1]
    torch.testing.assert_close(by_blocks, whole, rtol=0, atol=1e-12)
