"""Networks of chunked weights a block at a time: equal to the whole, in less memory."""

from itertools import accumulate

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from hyperfast import HyperMLP, HyperNet, Sine, TargetNet, use_backend
from hyperfast.nets import StaticHyperNet
from hyperfast.nn import parts
from tests.support.budget import assert_as_good, close
from tests.support.draw import draw
from tests.support.replaced import as_attribute, as_buffer

B, N, Z, C = 6, 3, 4, 5
# Pieces that cut across rows, that hold several layers; blocks that fit nothing.
FORMS = pytest.mark.parametrize("chunks", [5, 37, 200, (4, 3), (16, 1)], ids=str)
TWO_FORMS = pytest.mark.parametrize("chunks", [37, (4, 3)], ids=str)
# Two tasks a block; a task; some outputs of a layer: WHOLE and BLOCK as shares of the numbers that
# one network takes.
SIZES = {"tasks": (1, 2), "task": (1, 0), "outputs": (0.99, 0.25)}
ROWS = {
    "rows": ((B, N, 7), False),
    "row": ((B, 7), False),
    "shared": ((1, N, 7), False),
    "ids": ((11, 7), True),
    "none": ((0, 7), True),
}


def net():
    layers = nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 9, bias=False), nn.ELU(), nn.Linear(9, 5)
    return nn.Sequential(*layers).double()


def moved(model):
    """All its parameters, moved from where they start."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(draw(*p.shape, dtype=p.dtype, scale=0.4))
    return model


def make(chunks, module=None, **options):
    options = {"chunks": chunks, "chunk_dim": C, "hidden": (6,), "activation": "tanh"} | options
    return moved(HyperMLP(*HyperNet.for_module(module or net(), Z, **options)))


@pytest.fixture
def made(monkeypatch):
    """What was made in blocks; ``made.limits(model, size)`` sets how large these are."""

    class Made(list):
        def limits(self, model, size):
            numbers = parts._numbers(model.hyper)
            for name, share in zip(("WHOLE", "BLOCK"), SIZES[size], strict=True):
                monkeypatch.setattr(parts, name, int(share * numbers))
            self.clear()

    calls, anew = Made(), parts._anew

    def spy(call, *args):
        calls.append(args)
        return anew(call, *args)

    monkeypatch.setattr(parts, "_anew", spy)
    return calls


def results(model, x, z, ids=None):
    y = model(x, z, ids)
    leaves = [x, z, *model.parameters()]
    grads = torch.autograd.grad(y.sin().sum(), leaves, materialize_grads=True)
    return [y, *grads]


@FORMS
@pytest.mark.parametrize("base", [None, "net"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", ROWS)
def test_values_and_gradients(made, chunks, base, size, rows):
    shape, by_ids = ROWS[rows]
    model = make(chunks, base=base)
    x, z = draw(*shape, grad=True), draw(B, Z, grad=True)
    ids = torch.randint(B, shape[:1]) if by_ids else None
    want = results(model, x, z, ids)
    assert not made
    made.limits(model, size)
    close(results(model, x, z, ids), want)
    blocks = (torch.arange(B) if ids is None else ids) // (2 if size == "tasks" else 1)
    blocks = max(len(blocks.unique()), 1)
    assert len(made) >= 3 * blocks if size == "outputs" else len(made) == blocks


def check_all_sizes(made, model):
    """Blocks of every size give what the whole does."""
    x, z = draw(B, N, 7, grad=True), draw(B, Z, grad=True)
    want = results(model, x, z)
    for size in SIZES:
        made.limits(model, size)
        close(results(model, x, z), want)
        assert made


@TWO_FORMS
@pytest.mark.parametrize("transform", ["abs", "softplus"])
def test_transforms_of_weights(made, chunks, transform):
    model = make(chunks)
    model.target.weight_transform = transform
    check_all_sizes(made, model)


@TWO_FORMS
@pytest.mark.parametrize("size", SIZES)
def test_derivatives(made, chunks, size):
    stack = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model = make(chunks, stack)
    x, z = draw(2, 1, 3, grad=True), draw(2, Z, grad=True)
    names, values = zip(*model.named_parameters(), strict=True)
    made.limits(model, size)

    def run(x, z, *values):
        return functional_call(model, dict(zip(names, values, strict=True)), (x, z))

    assert torch.autograd.gradcheck(run, (x, z, *values), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x, z, *values), fast_mode=True)
    assert made


@TWO_FORMS
def test_one_latent(made, chunks):
    model = make(chunks)
    x, z = draw(2, N, 7), draw(Z)
    want = [model(t, z) for t in (x, x[0], x[0, 0])]
    made.limits(model, "outputs")
    close([model(t, z) for t in (x, x[0], x[0, 0])], want)
    assert made


def test_jagged_rows(made):
    model = make((4, 3))
    x = torch.nested.nested_tensor([draw(n, 7) for n in (2, 0, 5)], layout=torch.jagged)
    want = model(x, z := draw(3, Z))
    made.limits(model, "outputs")
    close(model(x, z).values(), want.values())
    assert made


def test_strided_rows_and_latents(made):
    model = make(37)
    x, z = draw(7, N, B).permute(2, 1, 0), draw(1, Z).expand(B, -1)
    want = model(x, z)
    for size in SIZES:
        made.limits(model, size)
        close(model(x, z), want)
        assert made


def test_tasks_without_rows_are_not_made(made):
    model, ids = make(37), torch.tensor([4, 4, 1])
    made.limits(model, "task")
    model(draw(3, 7), draw(B, Z), ids)
    assert len(made) == 2


@TWO_FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_precision(made, chunks, dtype):
    exact = make(chunks)
    x, z = draw(B, N, 7, grad=True), draw(B, Z, grad=True)
    model = make(chunks, net().to(dtype))
    model.load_state_dict(exact.state_dict())
    exact.load_state_dict(model.state_dict())
    low = [t.detach().to(dtype).requires_grad_() for t in (x, z)]
    truth = results(exact, *(t.detach().double().requires_grad_() for t in low))
    plain = results(model, *low)
    for size in SIZES:
        made.limits(model, size)
        for got, other, true in zip(results(model, *low), plain, truth, strict=True):
            assert_as_good(got, other, true, roundings=2, size=torch.Tensor.norm)


@TWO_FORMS
def test_autocast(made, chunks):
    """Also where blocks are made again, after autocast has been left."""
    model = make(chunks, net().float())
    x, z = draw(B, N, 7, dtype=torch.float32), draw(B, Z, dtype=torch.float32)

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x, z)
        return [y, *torch.autograd.grad(y.float().sum(), [*model.parameters()])]

    want = step()
    for size in SIZES:
        made.limits(model, size)
        for got, wanted in zip(step(), want, strict=True):
            assert got.dtype == wanted.dtype
            assert (got - wanted).norm() <= 0.03 * wanted.norm()


def test_what_is_made_again_has_the_parameters_of_the_call(made):
    model, other = make(37), make(37)
    state = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    x, z = draw(B, N, 7), draw(B, Z)
    want = torch.autograd.grad(other(x, z).sum(), [*other.parameters()])
    for size in SIZES:
        made.limits(model, size)
        y = functional_call(model, state, (x, z))
        close(torch.autograd.grad(y.sum(), [*state.values()]), want)
        assert made


def test_modules_are_left_alone(made):
    """Not even for a moment: another thread may be at work in them."""
    model = make(37)
    own = [*model.parameters()]

    class Look(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
            self.calls += 1
            assert all(p is q for p, q in zip(model.parameters(), own, strict=True))
            return fn(*args, **kwargs or {})

    for size in SIZES:
        made.limits(model, size)
        with Look() as look:
            y = model(draw(B, N, 7), draw(B, Z))
            forward = look.calls
            y.backward(y)
        assert made
        assert look.calls > 2 * forward  # it sees what is made again, too


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.target, "weight_transform", "abs"),
        lambda model: setattr(model.target.activations[0], "negative_slope", 3.0),
        lambda model: setattr(model.hyper.generator.trunk[1], "negative_slope", 3.0),
        lambda model: model.hyper.generator.trunk.append(nn.ReLU()),
    ],
    ids=["transform", "activation", "activation of the trunk", "trunk"],
)
def test_what_is_made_again_is_the_model_of_the_call(made, change):
    layers = nn.Linear(7, 13), nn.LeakyReLU(), nn.Linear(13, 5)
    model = make((4, 3), nn.Sequential(*layers).double(), activation=nn.LeakyReLU())
    leaves, (x, z) = [*model.parameters()], (draw(B, N, 7), draw(B, Z))
    want = torch.autograd.grad(model(x, z).sin().sum(), leaves)
    made.limits(model, "tasks")
    by_tasks = model(x, z)
    made.limits(model, "outputs")
    by_outputs = model(x, z)
    change(model)
    for y in (by_tasks, by_outputs):
        close(torch.autograd.grad(y.sin().sum(), leaves), want)
    assert made


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["heads.1", "offset", "trunk", "base"])
def test_some_parameters_are_frozen(made, name, size):
    """Those that train have no part in some of the blocks."""
    layers = nn.Linear(7, 13, bias=False), nn.Tanh(), nn.Linear(13, 5)
    base = "net" if name == "base" else None
    model = make((4, 3), nn.Sequential(*layers).double(), base=base)
    for other, p in model.named_parameters():
        p.requires_grad_(name in other)
    leaves, x, z = [p for p in model.parameters() if p.requires_grad], draw(B, N, 7), draw(B, Z)
    want = torch.autograd.grad(model(x, z).sin().sum(), leaves)
    made.limits(model, size)
    close(torch.autograd.grad(model(x, z).sin().sum(), leaves), want)
    assert made


def test_a_head_of_ones_own(made):
    model = make(37)
    model.hyper.generator.heads[0] = nn.Linear(6, 37).double()
    check_all_sizes(made, model)


def test_hooks_of_state_dicts_are_not_called(made):
    model, calls = make(37), []
    model.target.register_state_dict_pre_hook(lambda *args: calls.append(args))
    model(draw(B, N, 7), draw(B, Z))
    assert not calls


def test_a_static_network_of_linear_layers(made):
    model = moved(StaticHyperNet(net(), Z, chunks=(4, 3), params=None))
    x = draw(N, 7)
    want = model(x)
    made.limits(model, "outputs")
    close(model(x), want)
    assert made


# What sees the whole


def hook(model):
    model.hyper.generator.heads[0][0].register_forward_hook(lambda m, args, y: 2 * y)


def rows_of_others(model):
    model.hyper.generator.trunk[1] = nn.BatchNorm1d(6, affine=False).double()


def random(model):
    model.hyper.generator.trunk.append(nn.Dropout())


def own_activation(model):
    model.target.activations[0] = nn.PReLU().double()


def trained_sine(model):
    model.target.activations[0] = Sine(nn.Parameter(torch.tensor(3.0).double()))


def free_tensor(model):
    model.hyper.generator.trunk[1] = Sine(torch.tensor(3.0).double().requires_grad_())


def random_base(model):
    model.hyper.base = nn.Parameter(draw(model.hyper.spec.numel))
    parametrize.register_parametrization(model.hyper, "base", nn.Dropout())


def sparse(model):
    layer = model.hyper.generator.trunk[0]
    layer.weight = nn.Parameter(layer.weight.detach().to_sparse_csr())


def no_linear_head(model):
    model.hyper.generator.trunk[0] = nn.Linear(Z + C, 37).double()
    model.hyper.generator.heads[0] = nn.Identity()


def own_transform(model):
    model.target.weight_transform = lambda w: w / w.norm()


def own_target(model):
    class Twice(TargetNet):
        def forward(self, *args):
            return 2 * super().forward(*args)

    twice = Twice()
    twice.activations = model.target.activations
    twice.per_layer = True
    model.target = twice


CHANGES = hook, rows_of_others, random, own_activation, trained_sine, free_tensor
CHANGES += random_base, sparse, no_linear_head, own_transform, own_target


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_what_is_not_plain_runs_whole(made, change):
    model = make(37)
    made.limits(model, "task")
    change(model)
    x, z = draw(B, N, 7), draw(B, Z)
    torch.manual_seed(0)
    want = model.target(x, model.hyper(z))
    torch.manual_seed(0)
    close(model(x, z), want)
    assert not made


def test_a_patched_activation_runs_whole(made, monkeypatch):
    model, (x, z) = make(37), (draw(B, N, 7), draw(B, Z))
    before = model(x, z)
    monkeypatch.setattr(nn.Tanh, "forward", lambda self, x: x - x.mean(0))
    made.limits(model, "task")
    close(model(x, z), model.target(x, model.hyper(z)))
    assert (model(x, z) - before).abs().max() > 1e-3
    assert not made


@pytest.mark.parametrize("place", [as_attribute, as_buffer])
@pytest.mark.parametrize(
    ("at", "name"),
    [
        ("generator.trunk.0", "weight"),
        ("generator.heads.0.0", "bias"),
        ("generator", "embeddings"),
        ("generator", "offset"),
        ("", "base"),
    ],
)
def test_tensors_in_place_of_parameters_run_whole(made, place, at, name):
    """As in meta-learning. Their gradient is not lost."""
    model = make(37, base="net" if name == "base" else None)
    module, (x, z) = model.hyper.get_submodule(at), (draw(B, N, 7), draw(B, Z))
    own = getattr(module, name)
    (want,) = torch.autograd.grad(model(x, z).sin().sum(), own)
    start = own.detach().clone().requires_grad_()
    place(module, name, 1 * start)
    made.limits(model, "task")
    close(torch.autograd.grad(model(x, z).sin().sum(), start), [want])
    assert not made


def replica(module):
    """What nn.DataParallel runs on each device (torch.nn.parallel.replicate)."""
    copy = module._replicate_for_data_parallel()
    for name, child in module.named_children():
        copy._modules[name] = replica(child)
    for name, p in module._parameters.items():
        if p is not None:
            setattr(copy, name, p.view_as(p))
    return copy


@TWO_FORMS
def test_a_replica_runs_whole(made, chunks):
    model, (x, z) = make(chunks), (draw(B, N, 7), draw(B, Z))
    want = results(model, x.requires_grad_(), z.requires_grad_())
    made.limits(model, "task")
    y = replica(model)(x, z)
    grads = torch.autograd.grad(y.sin().sum(), [x, z, *model.parameters()])
    close([y, *grads], want)
    assert not made


def test_tensors_without_data_run_whole(made):
    model, ids = make(37), torch.tensor([4, 4, 1])
    x, z = draw(B, N, 7), draw(B, Z)
    made.limits(model, "task")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(t) for t in (x, x[:3, 0], z, ids)]
        shapes = [model(fake[0], fake[2]).shape, model(fake[1], fake[2], fake[3]).shape]
    model.to("meta")
    x, rows, z, ids = (t.to("meta") for t in (x, x[:3, 0], z, ids))
    shapes += [model(x, z).shape, model(rows, z, ids).shape]
    assert shapes == 2 * [(B, N, 5), (3, 5)]
    assert not made


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@TWO_FORMS
def test_graphs_and_transforms(dynamo, made, chunks):
    model = make(chunks)
    x, z = draw(B, N, 7), draw(B, Z)
    want = model(x, z)
    made.limits(model, "task")
    close(torch.compile(model, fullgraph=True, backend="aot_eager")(x, z), want)
    close(torch.vmap(model)(x.unsqueeze(1), z.unsqueeze(1)).squeeze(1), want)
    close(torch.func.jvp(lambda t: model(t, z), (x,), (x,))[0], want)
    with use_backend("reference"):
        close(model(x, z), want)
    assert not made


# Errors before any work


@pytest.mark.parametrize(
    ("error", "message", "x", "ids"),
    [
        (ValueError, r"x must have shape \(6, N, 7\) or \(6, 7\), .* \(5, 7\)", draw(5, 7), None),
        (ValueError, r"x must have shape \(R, 7\) .* \(3, 6\)", draw(3, 6), torch.zeros(3).long()),
        (TypeError, "x must have the dtype of the hypernetwork's weight", draw(B, 7).float(), None),
        (TypeError, "x must be a Tensor, got list", [1.0], None),
        (IndexError, r"task_ids must be in \[0, 6\), got 6", draw(1, 7), torch.tensor([6])),
        (TypeError, "task_ids must have dtype torch.int64", draw(1, 7), torch.tensor([0.0])),
    ],
    ids=["rows", "width", "dtype", "no tensor", "range", "type of ids"],
)
def test_bad_arguments(made, error, message, x, ids):
    model = make(37)
    made.limits(model, "task")
    with pytest.raises(error, match=message):
        model(x, draw(B, Z), ids)
    assert not made


def test_a_bad_x_of_one_latent(made):
    made.limits(model := make(37), "outputs")
    for x in (draw(N, 6), draw()):
        with pytest.raises(ValueError, match="x must have 7 features in its last dimension, got"):
            model(x, draw(Z))
    assert not made


def test_ids_of_one_latent(made):
    made.limits(model := make(37), "outputs")
    with pytest.raises(ValueError, match=r"z must have shape \(B, 4\) when task_ids is given, got"):
        model(draw(3, 7), draw(Z), torch.tensor([0, 0, 0]))
    assert not made


# Memory


def peak(call):
    """Bytes of the tensors that live at one time while it runs: what is allocated, not what is
    resident, as scratch memory of the library's products differs by processor. That of our kernels
    is not seen."""
    with torch.profiler.profile(profile_memory=True) as profile:
        _ = call()
    found = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    found.sort(key=lambda event: event.start_ns())
    assert found
    return max(accumulate(event.nbytes() for event in found))


@pytest.mark.parametrize(("tasks", "width"), [(1000, 64), (1, 2000)], ids=["tasks", "outputs"])
@pytest.mark.parametrize("chunks", [300, (16, 8)], ids=str)
def test_memory_is_that_of_a_block(chunks, tasks, width, monkeypatch):
    """Five times the numbers of a block, as there are gradients, and the gradients of the
    parameters, of a block and of all: about half the weights of all tasks. Made whole, these take
    5 to 12 times their weights in training."""
    block = 1 << 19
    monkeypatch.setattr(parts, "WHOLE", block)
    monkeypatch.setattr(parts, "BLOCK", block)
    stack = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
    model = HyperMLP(*HyperNet.for_module(stack, 16, chunks=chunks))
    x, z = torch.randn(tasks, 1, width), torch.randn(tasks, 16)
    limit = 5 * 4 * block + 2 * sum(p.nbytes for p in model.parameters())
    with torch.no_grad():
        assert peak(lambda: model(x, z)) < limit
    trained = peak(lambda: torch.autograd.grad(model(x, z).sum(), [*model.parameters()]))
    assert trained < limit < 0.6 * 4 * tasks * model.hyper.total_target_params
