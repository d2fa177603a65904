"""Hypernetworks whose weights are made in chunks: what they make, how that starts, and that they do
what every hypernetwork does."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state
from torch.utils.flop_counter import FlopCounterMode

from hyperfast import HyperMLP, HyperNet, TaskBank
from hyperfast.plans.choose import DEVICES
from tests.support.budget import close
from tests.support.draw import draw

B, N, Z, C = 3, 2, 4, 5
F64 = {"dtype": torch.float64}
# The compiler and forward-mode derivatives use parts of torch.jit that warn.
OF_TORCH = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
FORMS = pytest.mark.parametrize("chunks", [37, (4, 3)], ids=str)


def net():
    """Kernels of two sizes, vectors, a matrix: none fits blocks of 4 x 3."""
    parts = nn.Conv2d(2, 5, 3), nn.GroupNorm(1, 5), nn.Tanh(), nn.Conv2d(5, 7, (1, 2)), nn.Flatten()
    return nn.Sequential(*parts, nn.Linear(42, 3)).double()


def small():
    return nn.Sequential(nn.Conv1d(1, 5, 2), nn.Tanh(), nn.LayerNorm(3)).double()


def make(chunks, module=None, **options):
    """A model, all of whose parameters have been moved from where they start."""
    options = {"chunks": chunks, "chunk_dim": C, "hidden": (6,), "activation": "tanh"} | options
    model = HyperMLP(*HyperNet.for_module(module or net(), Z, **options))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(draw(*p.shape, scale=0.4))
    return model


def x_and_z():
    return draw(B, N, 2, 5, 5), draw(B, Z)


def shifted(generator, n, made):
    """What one parameter is, of what chunks hold for it: rank one has all its offsets."""
    sizes = [p.numel() if p.ndim < 2 else 0 for p in net().parameters()]
    offset = generator.offset.split(sizes)[n]
    made = generator.scale[n] * made
    return made + offset if len(offset) else made


def test_pieces_are_made_one_by_one_of_latent_and_embedding():
    hyper = make(37).hyper
    made, z = hyper.generator, draw(Z)
    rows = [made.heads[0](made.trunk(torch.cat([z, e]))) for e in made.embeddings]
    assert [len(row) for row in rows] == [37] * math.ceil(hyper.spec.numel / 37)
    pieces = hyper.spec.split(torch.cat(rows)[: hyper.spec.numel])
    assert hyper.spec.numel % 37  # the last is padded
    for n, (got, piece) in enumerate(zip(hyper(z), pieces, strict=True)):
        close(got, shifted(made, n, piece))


def test_blocks_are_those_of_the_paper():
    """Its equations, entry by entry."""
    hyper = make((4, 3)).hyper
    made, z = hyper.generator, draw(Z)
    embeddings = iter(made.embeddings)
    shapes = hyper.spec.shapes
    want = {}
    # Embeddings lie head by head: of 3x3 kernels, vectors, 1x2 kernels, the matrix.
    for first, _, last in made.heads:
        width = first.out_features // 6  # input channels of a block
        size = last.out_features // 4
        for n, shape in enumerate(shapes):
            out, ins, *kernel = (*shape, 1) if len(shape) == 1 else shape
            if (width, size) != (1 if len(shape) == 1 else 3, math.prod(kernel)):
                continue
            whole = torch.full((out, ins, size), math.nan, **F64)
            for row in range(0, out, 4):
                for col in range(0, ins, width):
                    h = made.trunk(torch.cat([z, next(embeddings)]))
                    for i in range(min(width, ins - col)):
                        a = first.weight.view(width, 6, 6)[i] @ h + first.bias.view(width, 6)[i]
                        k = (last.weight @ a + last.bias).view(4, size)
                        whole[row : row + 4, col + i] = k[: out - row]
            want[n] = whole.view(shape)
    assert next(embeddings, None) is None
    for n, got in enumerate(hyper(z)):
        close(got, shifted(made, n, want[n]))


@FORMS
def test_a_batch_is_its_latents_one_by_one(chunks):
    model = make(chunks)
    x, z = x_and_z()
    for b, task in enumerate(z):
        state = dict(zip(model.target.names, model.hyper(task), strict=True))
        close(model(x, z)[b], functional_call(net(), state, x[b]))
    rows = torch.tensor([2, 0, 2, 1])
    ids = model(x[rows, 0], z, rows)
    close(ids, model(x, z)[rows, 0])
    assert [len(w) for w in model.hyper(z[:0])] == [0] * len(model.hyper.spec.shapes)


@FORMS
def test_gradients(chunks):
    model = make(chunks, small())
    x, z = draw(2, 1, 1, 4, grad=True), draw(2, Z, grad=True)
    names, values = zip(*model.named_parameters(), strict=True)

    def run(x, z, *values):
        return functional_call(model, dict(zip(names, values, strict=True)), (x, z))

    assert torch.autograd.gradcheck(run, (x, z, *values), fast_mode=True)
    assert torch.autograd.gradgradcheck(model, (x, z), fast_mode=True)
    model(x, z).sum().backward()
    assert all(p.grad.any() for p in values)


# How they start


@FORMS
@pytest.mark.parametrize("init", ["hyperfan_in", "hyperfan_out"])
def test_every_weight_starts_with_the_variance_of_its_own_layer(chunks, init):
    """Whatever layers a chunk fills. The mean over hypernetworks must lie within 5 standard errors
    of 1 / fan, and they are so many that an error of 20% would show."""
    parts = nn.Conv2d(3, 32, 3), nn.GroupNorm(4, 32), nn.Conv2d(32, 8, 1), nn.Linear(8, 64)
    found = []
    for seed in range(60):
        torch.manual_seed(seed)
        hyper, _ = HyperNet.for_module(
            nn.Sequential(*parts), 32, chunks=chunks, chunk_dim=32, init=init
        )
        weights = hyper(torch.randn(4, 32))
        found.append(torch.stack([w.detach().square().mean() for w in weights if w.ndim > 2]))
    fans = {"hyperfan_in": (27, 32, 8), "hyperfan_out": (32 * 9, 8, 64)}[init]
    ratio = torch.stack(found) * torch.tensor(fans)
    error = ratio.std(0) / len(ratio) ** 0.5
    assert error.max() < 0.04
    assert ((ratio.mean(0) - 1).abs() < 5 * error).all()


@FORMS
def test_a_plain_stack_has_the_gain_of_its_activation(chunks):
    """Some of its parameters start at values of the net, or none."""
    for bias in (True, False):
        stack = nn.Sequential(nn.Linear(60, 50, bias), nn.ReLU(), nn.Linear(50, 40, bias=False))
        moments = []
        for seed in range(10):
            torch.manual_seed(seed)
            hyper, _ = HyperNet.for_module(stack, 64, chunks=chunks, hidden=(200,))
            first, *_, last = hyper(torch.randn(20, 64))
            moments.append([first.square().mean().item(), last.square().mean().item()])
        assert torch.tensor(moments).mean(0).tolist() == pytest.approx([2 / 60, 2 / 50], rel=0.1)


@FORMS
def test_vectors_and_constant_weights_start_as_in_the_net(chunks):
    module = net()
    nn.init.constant_(module[3].weight, 0.25)
    hyper, target = HyperNet.for_module(module, Z, chunks=chunks)
    for name, w in zip(target.names, hyper(draw(9, Z)), strict=True):
        same = torch.equal(w, module.get_parameter(name).expand_as(w))
        assert same == (name not in ("0.weight", "5.weight"))
    based, _ = HyperNet.for_module(module, Z, chunks=chunks, base="net")
    for p, w in zip(module.parameters(), based(draw(9, Z)), strict=True):
        assert torch.equal(w, p.expand_as(w))


@FORMS
def test_reset_parameters(chunks):
    model = make(chunks)
    hyper, module = model.hyper, net()
    fresh, _ = HyperNet.for_module(module, Z, chunks=chunks, chunk_dim=C)
    before = {name: p.clone() for name, p in fresh.generator.named_parameters()}
    with torch.no_grad():
        for p in fresh.parameters():
            p.fill_(7.0)
    fresh.reset_parameters()
    for name, p in fresh.generator.named_parameters():
        assert torch.equal(p, before[name]) == (name in ("scale", "offset") or "bias" in name)
    hyper.reset_parameters()
    assert hyper.generator.embeddings.std().item() == pytest.approx(1, abs=0.2)


# What every hypernetwork does


@FORMS
def test_state_dict_and_copies(chunks):
    model, other = make(chunks), make(chunks)
    x, z = x_and_z()
    want = model(x, z)
    assert not torch.equal(other(x, z), want)
    other.load_state_dict(model.state_dict())
    for twin in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x, z), want)
    assert {p.dtype for p in model.float().parameters()} == {torch.float32}
    torch.testing.assert_close(model(x.float(), z.float()), want.float(), rtol=1e-4, atol=1e-5)


@OF_TORCH
@FORMS
def test_exports(chunks):
    """The hypernetwork for any number of tasks; vmap in a target fixes this, whatever made it."""
    hyper, z = make(chunks).hyper, draw(B, Z)
    tasks = torch.export.Dim("tasks", min=2)
    exported = torch.export.export(hyper, (z,), dynamic_shapes=({0: tasks},)).module()
    for got, want in zip(exported(z[:2]), hyper(z[:2]), strict=True):
        close(got, want)
    model = make(chunks, small())
    x = draw(B, N, 1, 4)
    close(torch.export.export(model, (x, z)).module()(-x, -z), model(-x, -z))


@OF_TORCH
@FORMS
def test_compiles(dynamo, chunks):
    model = make(chunks, small())
    x, z = draw(B, N, 1, 4), draw(B, Z)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    grads = []
    for run in (compiled, model):
        y = run(x, z)
        grads.append([y, *torch.autograd.grad(y.square().sum(), [*model.parameters()])])
    for got, want in zip(*grads, strict=True):
        close(got, want)


@OF_TORCH
@FORMS
def test_many_hypernetworks_under_vmap(chunks):
    models = [make(chunks) for _ in range(2)]
    state, buffers = stack_module_state(models)
    x, z = x_and_z()

    def run(state, buffers):
        return functional_call(models[0], (state, buffers), (x, z))

    close(torch.vmap(run)(state, buffers), torch.stack([model(x, z) for model in models]))
    hyper = models[0].hyper
    tangents = torch.func.jvp(hyper, (z,), (torch.ones_like(z),))[1]
    slopes = torch.func.jacfwd(lambda t: hyper(z + t))(z.new_zeros(()))
    for got, wanted in zip(tangents, slopes, strict=True):
        close(got, wanted)


@FORMS
def test_autocast(chunks):
    model = make(chunks)
    x, z = x_and_z()
    exact, model = model(x, z), model.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x.float(), z.float())
    assert 0 < (y - exact).abs().max() < 0.05 * exact.abs().max()


def test_a_given_trunk_takes_latent_and_embedding():
    trunk = nn.Sequential(nn.Linear(Z + C, 9), nn.LayerNorm(9)).double()
    before = [p.clone() for p in trunk.parameters()]
    hyper, _ = HyperNet.for_module(net(), Z, chunks=(4, 3), chunk_dim=C, trunk=trunk)
    hyper.reset_parameters()
    assert all(map(torch.equal, before, trunk.parameters()))
    assert hyper.generator.heads[0][0].in_features == 9
    kernel = hyper(draw(200, Z))[0]
    assert 0.5 < kernel.var() * 18 < 2
    with pytest.raises(ValueError, match=rf"trunk must map \(2, {Z + C}\) to \(2, H\)"):
        HyperNet.for_module(net(), Z, chunks=9, chunk_dim=C, trunk=nn.Flatten(0))


@FORMS
def test_a_bank_of_chunked_networks(chunks):
    module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    model, z, ids = make(chunks, module), draw(5, Z), torch.tensor([4, 0, 0, 3])
    assert not model.fused
    bank = TaskBank.from_latents(model.hyper, z)
    x = draw(4, 4)
    close(bank(x, ids), model(x, z, ids))
    with FlopCounterMode(display=False) as counter:
        model.hyper(z[0])
    flops = model.hyper.generator.flops
    assert flops == counter.get_total_flops()
    costs, machine = bank.explain(), DEVICES["cpu"]
    moved = (costs.regenerate_bytes + 2 * costs.keep_bytes) / machine.bandwidth
    assert costs.regenerate_seconds == pytest.approx(flops / machine.flops + moved)


def test_one_number_is_a_size_whatever_counts_it():
    for nine in (np.int64(9), torch.tensor(9), np.array(9)):
        assert HyperNet.for_module(net(), Z, chunks=nine)[0].generator.heads[0][0].out_features == 9
    for pair in (np.array([3, 2]), torch.tensor([3, 2])):
        hyper, _ = HyperNet.for_module(net(), Z, chunks=pair)
        assert hyper.generator.layout.rows == 3
    scalar = nn.Module()
    scalar.gain, scalar.empty = nn.Parameter(torch.tensor(3.0)), nn.Parameter(torch.ones(0, 4))
    for chunks in (2, [2, 2]):
        gain, empty = HyperNet.for_module(scalar, Z, chunks=chunks)[0](torch.randn(B, Z))
        assert torch.equal(gain, torch.full((B,), 3.0))
        assert empty.shape == (B, 0, 4)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "chunks must be at least 1, got 0", {"chunks": 0}),
        (TypeError, "chunks must be an int, got 2.5", {"chunks": 2.5}),
        (TypeError, "chunks must be an int, got True", {"chunks": True}),
        (ValueError, r"a pair \(rows, cols\), got \(3,\)", {"chunks": (3,)}),
        (ValueError, r"a pair \(rows, cols\), got '16'", {"chunks": "16"}),
        (ValueError, r"chunks\[1\] must be at least 1, got 0", {"chunks": (3, 0)}),
        (TypeError, r"chunks\[0\] must be an int, got '3'", {"chunks": ("3", 3)}),
        (ValueError, "separate must be False with chunks", {"chunks": 3, "separate": True}),
        (ValueError, "chunk_dim must be None without chunks, got 3", {"chunk_dim": 3}),
        (ValueError, "chunk_dim must be at least 1, got 0", {"chunks": 3, "chunk_dim": 0}),
        (ValueError, "chunk_dim must be given where z_dim is 0", {"chunks": 3, "z_dim": 0}),
        (ValueError, "z_dim must be at least 0, got -1", {"chunks": 3, "z_dim": -1}),
        (ValueError, "z_dim must be at least 1, got 0", {"z_dim": 0}),
        (ValueError, r"net must have parameters, got ReLU", {"chunks": 3, "net": nn.ReLU()}),
    ],
    ids=str,
)
def test_bad_options(error, message, options):
    with pytest.raises(error, match=message):
        HyperNet.for_module(**{"net": net(), "z_dim": Z} | options)
