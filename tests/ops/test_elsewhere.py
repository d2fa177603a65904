"""What other parts of PyTorch ask of the ops: traces, functionalization, FLOPs, DTensor."""

import io
import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

import hyperfast
from hyperfast.functional import hyper_linear, task_linear
from hyperfast.nn import parts
from hyperfast.ops.define import CPU_OPS, OPS
from tests.support.budget import close
from tests.support.draw import draw

# TorchScript is deprecated, and warns of every size that a check reads.
traces = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")


def model(**options):
    return hyperfast.HyperMLP(hyperfast.HyperNet(5, 4, 8, 3, dtype=torch.float64, **options))


X, Z, ROWS, IDS = (6, 7, 4), (6, 5), (11, 4), torch.tensor([5, 0, 0, 3, 2, 5, 1, 1, 0, 4, 2])
LINEAR = {  # of a batch, of mixed rows: arguments of a layer alone
    "task_linear": (task_linear, [(6, 8, 4), (6, 8)]),
    "hyper_linear": (hyper_linear, [(6, 9), (8 * 5, 9), (8 * 5,)]),
}


def chunked():
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    return hyperfast.HyperMLP(*hyperfast.HyperNet.for_module(net.double(), 5, chunks=7))


class OneOutput(torch.nn.Module):
    """A HyperLSTM without its last states."""

    def __init__(self):
        super().__init__()
        self.lstm = hyperfast.nets.HyperLSTM(4, 3, dtype=torch.float64)

    def forward(self, x):
        return self.lstm(x)[0]


TRACED = {
    "model": (model, X, Z),
    "separate": (lambda: model(separate=True), X, Z),
    "chunked": (chunked, X, Z),
    "chunked rows": (chunked, (6, 4), Z),
    "HyperLSTM": (OneOutput, X),
}


@traces
@pytest.mark.parametrize("name", TRACED)
@pytest.mark.parametrize("large", [True, False], ids=["large", "small"])
def test_a_trace_is_saved_and_differentiates(name, large, monkeypatch):
    if large:  # chunked weights would be made in blocks
        monkeypatch.setattr(parts, "WHOLE", 0)
    make, *shapes = TRACED[name]
    ours, args = make(), [draw(*s) for s in shapes]
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(ours, tuple(args)), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    y, expected = loaded(*args), ours(*args)
    close(y, expected)
    for one, other in zip(loaded.parameters(), ours.parameters(), strict=True):
        (a,), (b,) = (
            torch.autograd.grad(o.square().sum(), [p], retain_graph=True)
            for o, p in ((y, one), (expected, other))
        )
        close(a, b)


@traces
@pytest.mark.parametrize("name", LINEAR)
def test_a_trace_of_a_layer(name):
    layer, shapes = LINEAR[name]
    args = [draw(*X), *(draw(*s, grad=True) for s in shapes)]
    traced = torch.jit.trace(layer, tuple(args))
    close(traced(*args), layer(*args))


@pytest.mark.parametrize("name", [*LINEAR, "model"])
def test_functionalize(name):
    layer, shapes = (model(), [Z]) if name == "model" else LINEAR[name]
    args = [draw(*X), *(draw(*s) for s in shapes)]
    close(torch.func.functionalize(layer)(*args), layer(*args))


def flops(call, *args):
    with FlopCounterMode(display=False) as counter:
        call(*args)
    return counter.get_total_flops()


def test_flops_of_a_model():
    """Weights made once a task and applied to each row; in training twice as much again, but that
    gradients of inputs are not asked for."""
    ours, x, z = model(hidden=()), draw(*X), draw(*Z)
    made, applied = 6 * 5 * ours.hyper.spec.numel, 6 * 7 * (4 * 8 + 8 * 3)
    assert flops(ours, x, z) == 2 * (made + applied)
    y = ours(x, z)
    backward = flops(lambda: y.sum().backward())
    assert 2 * (made + applied) <= backward <= 6 * (made + applied)


@pytest.mark.parametrize("name", LINEAR)
def test_flops_of_a_layer(name):
    layer, shapes = LINEAR[name]
    args = [draw(*X), *(draw(*s) for s in shapes)]
    made = 6 * 9 * 8 * 5 if name == "hyper_linear" else 0
    assert flops(layer, *args) == 2 * (made + 6 * 7 * 4 * 8)


def test_every_op_has_a_formula():
    from torch.utils.flop_counter import flop_registry

    assert {getattr(torch.ops.hyperfast, name) for name in (*OPS, *CPU_OPS)} <= flop_registry.keys()


@pytest.fixture(scope="module")
def mesh():
    from torch.distributed.device_mesh import init_device_mesh

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", WORLD_SIZE="1")
    dist.init_process_group("gloo")
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("ragged", [False, True], ids=["batched", "ragged"])
@pytest.mark.parametrize("name", [*LINEAR, "model"])
def test_dtensor(name, ragged, mesh):
    """Tasks or rows are cut, what all tasks share is replicated; gradients too. On more processes:
    tests/distributed."""
    from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor

    layer, shapes = (model(), [Z]) if name == "model" else LINEAR[name]
    parameters = list(layer.parameters()) if name == "model" else []
    ids = [IDS] if ragged else []
    args = [draw(*(ROWS if ragged else X), grad=True), *(draw(*s, grad=True) for s in shapes)]
    expected = layer(*args, *ids)
    wanted = torch.autograd.grad(expected.square().sum(), [*args, *parameters])
    if name == "model":
        distribute_module(layer, mesh)
        parameters = list(layer.parameters())
    shared = Replicate() if ragged else Shard(0)
    places = [
        Shard(0),
        *([shared] if name != "task_linear" else [shared] * 2),
        Replicate(),
        Replicate(),
    ]
    cut = [
        distribute_tensor(a.detach(), mesh, [p]).requires_grad_()
        for a, p in zip(args, places, strict=False)
    ]
    cut_ids = [distribute_tensor(i, mesh, [Shard(0)]) for i in ids]
    y = layer(*cut, *cut_ids)
    close(y.full_tensor(), expected)
    got = torch.autograd.grad(y.square().sum(), [*cut, *parameters])
    close([g.full_tensor() for g in got], list(wanted))
