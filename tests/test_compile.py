"""torch.compile without graph breaks, static and dynamic, and torch.export."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import hyperfast
from tests.support.budget import close

# PyTorch's compiler imports modules of its own that still use torch.jit.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

TARGET = hyperfast.TargetNet("tanh")
IDS = torch.tensor([1, 0, 0, 1, 1])


@pytest.fixture
def hyper():
    return hyperfast.HyperNet(5, 4, 8, 3, activation="tanh", target_activation="tanh").double()


def runner(hyper, kind):
    if kind == "model":
        return hyperfast.HyperMLP(hyper, TARGET)
    return lambda x, z, ids=None: TARGET(x, hyper(z), ids)


def inputs(tasks, rows, form):
    x = {
        "rows": (tasks, rows, 4),
        "single": (tasks, 4),
        "ragged": (tasks * rows, 4),
    }[form]
    tensors = torch.randn(x, dtype=torch.float64), torch.randn(tasks, 5, dtype=torch.float64)
    ids = (torch.randint(tasks, (tasks * rows,)),) if form == "ragged" else ()
    return *(t.requires_grad_() for t in tensors), *ids


def check(compiled, plain, hyper, args):
    """Value and every gradient."""
    leaves = [*args[:2], *hyper.parameters()]
    results = []
    for f in (compiled, plain):
        y = f(*args)
        results.append((y, torch.autograd.grad(y.sin().sum(), leaves)))
    close(*results)


every_kind = pytest.mark.parametrize("kind", ["model", "target"])
every_form = pytest.mark.parametrize("form", ["rows", "single", "ragged"])


@every_form
@every_kind
def test_inductor(hyper, kind, form, dynamo):
    plain = runner(hyper, kind)
    check(torch.compile(plain, fullgraph=True), plain, hyper, inputs(3, 2, form))


@every_form
@every_kind
def test_static(hyper, kind, form, dynamo):
    counter = CompileCounterWithBackend("aot_eager")
    plain = runner(hyper, kind)
    compiled = torch.compile(plain, fullgraph=True, backend=counter, dynamic=False)
    args = inputs(3, 2, form)
    for _ in range(3):
        check(compiled, plain, hyper, args)
    assert counter.frame_count == 1
    check(compiled, plain, hyper, inputs(4, 3, form))
    assert counter.frame_count == 2


@every_form
@every_kind
def test_dynamic_compiles_once(hyper, kind, form, dynamo):
    counter = CompileCounterWithBackend("aot_eager")
    plain = runner(hyper, kind)
    compiled = torch.compile(plain, fullgraph=True, backend=counter, dynamic=True)
    for tasks, rows in [(3, 2), (7, 5), (64, 33), (5, 6)]:
        check(compiled, plain, hyper, inputs(tasks, rows, form))
    assert counter.frame_count == 1


@every_form
@every_kind
def test_marked_dynamic(hyper, kind, form, dynamo):
    """A size that the library, forward or backward, took for a constant would raise here."""
    plain = runner(hyper, kind)
    x, z, *ids = inputs(3, 2, form)
    tasks = (x, z) if form != "ragged" else (z,)
    for t in tasks:
        torch._dynamo.mark_dynamic(t, 0)
    if form == "rows":
        torch._dynamo.mark_dynamic(x, 1)
    if form == "ragged":
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(ids[0], 0)
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    check(compiled, plain, hyper, (x, z, *ids))


@every_kind
def test_a_changing_batch_settles(hyper, kind, dynamo):
    """By default the second size makes the graph dynamic, and no third one compiles."""
    counter = CompileCounterWithBackend("aot_eager")
    plain = runner(hyper, kind)
    compiled = torch.compile(plain, fullgraph=True, backend=counter)
    for tasks in (3, 5, 7, 11, 13):
        check(compiled, plain, hyper, inputs(tasks, 2, "rows"))
    assert counter.frame_count == 2


@every_kind
def test_one_network(hyper, kind, dynamo):
    plain = runner(hyper, kind)
    args = torch.randn(7, 4).double().requires_grad_(), torch.randn(5).double().requires_grad_()
    check(torch.compile(plain, fullgraph=True, backend="aot_eager"), plain, hyper, args)


@pytest.mark.parametrize("bad", [-1, 2])
@every_kind
def test_ids_are_checked_in_a_compiled_graph(hyper, kind, bad, dynamo):
    compiled = torch.compile(runner(hyper, kind), fullgraph=True)
    x, z, ids = torch.randn(5, 4).double(), torch.randn(2, 5).double(), IDS.clone()
    assert compiled(x, z, ids).shape == (5, 3)
    ids[2] = bad
    with pytest.raises(IndexError, match="task_ids must be in"):
        compiled(x, z, ids)


def test_a_compiled_graph_follows_the_backend(hyper, dynamo):
    model = hyperfast.HyperMLP(hyper, TARGET)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    args = inputs(3, 2, "rows")
    compiled(*args)
    assert "hyperfast" in str(counter.graphs[0].graph)
    with hyperfast.use_backend("reference"):
        check(compiled, model, hyper, args)
    assert counter.frame_count == 2
    assert "hyperfast" not in str(counter.graphs[1].graph)


@every_form
@every_kind
def test_transforms_inside(hyper, kind, form, dynamo):
    """vmap over ensembles of inputs, and grad, compiled."""
    plain = runner(hyper, kind)
    x, z, *ids = (t.detach() for t in inputs(3, 2, form))

    def many(x, z):
        return torch.vmap(torch.func.grad(lambda x: plain(x, z, *ids).sin().sum()))(x)

    x = torch.stack([x, -x])
    compiled = torch.compile(many, fullgraph=True, backend="aot_eager")
    close(compiled(x, z), many(x, z))


def test_jagged(hyper, dynamo):
    model = hyperfast.HyperMLP(hyper, TARGET)
    values, offsets = torch.randn(8, 4).double(), torch.tensor([0, 2, 7, 8])
    x = torch.nested.nested_tensor_from_jagged(values, offsets)
    z = torch.randn(3, 5).double()
    y = torch.compile(model, fullgraph=True, backend="aot_eager")(x, z)
    close(y.values(), model(x, z).values())


class Both(torch.nn.Module):
    """What a user would export: hypernetwork and target as one."""

    def __init__(self, hyper):
        super().__init__()
        self.hyper, self.target = hyper, TARGET

    def forward(self, x, z, ids=None):
        return self.target(x, self.hyper(z), ids)


@pytest.mark.parametrize("strict", [False, True], ids=["trace", "strict"])
@every_form
@every_kind
def test_export(hyper, kind, form, strict, dynamo):
    module = hyperfast.HyperMLP(hyper, TARGET) if kind == "model" else Both(hyper)
    tasks, rows = torch.export.Dim("tasks"), torch.export.Dim("rows")
    shapes = {
        "rows": ({0: tasks, 1: rows}, {0: tasks}),
        "single": ({0: tasks}, {0: tasks}),
        "ragged": ({0: rows}, {0: tasks}, {0: rows}),
    }[form]
    example = [t.detach() for t in inputs(3, 2, form)]
    program = torch.export.export(module, tuple(example), dynamic_shapes=shapes, strict=strict)
    for tasks, rows in [(3, 2), (9, 5)]:
        args = [t.detach() for t in inputs(tasks, rows, form)]
        close(program.module()(*args), module(*args))
