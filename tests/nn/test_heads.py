"""HyperNets of every kind of trunk and head: what they generate, and that the model that does not
form the weights equals the one that does."""

import pytest
import torch
from torch import nn

import hyperfast
from hyperfast import HyperMLP, HyperNet, TargetNet
from tests.support.budget import close
from tests.support.draw import draw

B, N, Z, SIZES = 4, 3, 5, (4, 7, 6, 3)
F64 = {"dtype": torch.float64}


def stir(module):
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(draw(*p.shape, scale=0.4))
    return module


def make(**options):
    options.setdefault("target_activation", "tanh")
    return stir(HyperNet(Z, SIZES[0], SIZES[1:-1], SIZES[-1], **F64, **options))


def trunk():
    return nn.Sequential(nn.Linear(Z, 9), nn.LayerNorm(9), nn.SiLU(), nn.Linear(9, 8)).double()


OPTIONS = [
    {},
    {"transform": "abs"},
    {"rank": 2},
    {"base": True},
    {"base": True, "transform": "square"},
    {"base": True, "rank": 1},
    {"bias": "shared"},
    {"bias": [True, False, "shared"]},
    {"bias": [False, True, False], "transform": "softplus"},
    {"bias": ["shared", True, None], "rank": 2, "base": True},
]


@pytest.mark.parametrize("separate", [False, True], ids=["one", "separate"])
@pytest.mark.parametrize("own_trunk", [False, True], ids=["MLP", "module"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_fused_equals_stored(options, own_trunk, separate):
    hyper = make(trunk=trunk() if own_trunk else None, separate=separate, **options)
    model, target = HyperMLP(hyper), TargetNet("tanh")
    assert model.fused
    z, ids = draw(B, Z, grad=True), torch.tensor([1, 0, 3, 1, 1])
    leaves = [z, *hyper.parameters()]
    for shape, task_ids in (((B, N, 4), None), ((B, 4), None), ((5, 4), ids)):
        x = draw(*shape, grad=True)
        y, stored = model(x, z, task_ids), target(x, hyper(z), task_ids)
        close(y, stored)
        grad = draw(*y.shape)
        kwargs = {"allow_unused": True, "materialize_grads": True}  # trunks of biases, of no rows
        mine = torch.autograd.grad(y, [x, *leaves], grad, **kwargs)
        for got, wanted in zip(
            mine, torch.autograd.grad(stored, [x, *leaves], grad, **kwargs), strict=True
        ):
            close(got, wanted)
    assert all(w.shape[0] == B for w in hyper(z))
    close(model(draw(7, 4).fill_(1.0), z[0]), target(torch.ones(7, 4, **F64), hyper(z[0])))


@pytest.mark.parametrize("separate", [False, True], ids=["one", "separate"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_autocast(options, separate):
    model = HyperMLP(make(separate=separate, **options).float())
    x, z, ids = torch.randn(5, 4), torch.randn(B, Z), torch.tensor([1, 0, 3, 1, 1])
    exact = model(x, z, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, stored = model(x, z, ids), TargetNet("tanh")(x, model.hyper(z), ids)
    assert y.dtype == torch.bfloat16
    error, other = ((t.float() - exact).abs().max() for t in (y, stored))
    assert 0 < error <= 2 * other + 2**-7 * exact.abs().max()
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_weights_have_the_shapes_of_the_spec_whatever_makes_them(options):
    hyper = make(**options)
    assert [w.shape[1:] for w in hyper(draw(2, Z))] == [*map(torch.Size, hyper.spec.shapes)]
    assert hyper.generator(draw(2, Z)).shape == (2, hyper.generated.numel)
    assert sum(w.numel() for w in hyper(draw(Z))) == hyper.total_target_params


def test_a_transform_of_the_hypernetwork_is_that_of_a_target():
    hyper, plain = make(transform="abs"), make()
    plain.load_state_dict(hyper.state_dict())
    x, z = draw(B, N, 4), draw(B, Z)
    close(HyperMLP(hyper)(x, z), HyperMLP(plain, TargetNet("tanh", "abs"))(x, z))
    assert all((w >= 0).all() for w in hyper(z)[::2])
    both = HyperMLP(hyper, TargetNet("tanh", torch.sqrt))
    assert not both.fused
    close(both(x, z), TargetNet("tanh")(x, [w.sqrt() if w.ndim == 3 else w for w in hyper(z)]))


def test_a_function_is_a_transform_by_stored_weights():
    hyper = make(transform=torch.sin)
    assert not HyperMLP(hyper).fused
    plain = make()
    plain.load_state_dict(hyper.state_dict())
    x, z = draw(B, N, 4), draw(B, Z)
    sines = [w.sin() if w.ndim == 3 else w for w in plain(z)]
    close(HyperMLP(hyper)(x, z), TargetNet("tanh")(x, sines))


def test_separate_trunks_are_apart():
    for own in (None, trunk()):
        hyper = HyperNet(Z, *SIZES[:1], SIZES[1:-1], SIZES[-1], trunk=own, separate=True, **F64)
        assert len(hyper.generator) == len(hyper.spec.shapes)
        firsts = [next(g.parameters()) for g in hyper.generator]
        assert len({id(p) for p in firsts}) == len(firsts)
        assert not torch.equal(firsts[0], firsts[1])
        z = draw(2, Z)
        pieces = [g(z) for g in hyper.generator]
        assert torch.equal(hyper.generator(z), torch.cat(pieces, 1))
        assert not hasattr(hyper, "head")
        with pytest.raises(TypeError, match=r"must be an nn\.Sequential"):
            hyper.features(z)


def test_a_given_trunk_is_used_as_it_is():
    own = trunk()
    before = [p.clone() for p in own.parameters()]
    hyper = HyperNet(Z, 4, 7, 3, trunk=own, **F64)
    hyper.reset_parameters()
    assert all(map(torch.equal, before, own.parameters()))
    z = draw(6, Z)
    assert torch.equal(hyper.features(z), own(z))
    close(hyper.spec.flatten(hyper(z)), hyper.head(own(z)))
    norm = nn.Sequential(nn.Linear(Z, 8), nn.BatchNorm1d(8))
    HyperNet(Z, 4, 7, 3, trunk=norm)
    assert norm[1].num_batches_tracked == 0
    assert norm.training
    lazy = nn.Sequential(nn.LazyLinear(8), nn.ReLU())
    assert HyperNet(Z, 4, 7, 3, trunk=lazy).head.in_features == 8


@pytest.mark.parametrize(
    "options",
    [{}, {"rank": 3}, {"transform": "abs"}, {"transform": "square"}, {"transform": "exp"},
     {"base": True}, {"base": True, "rank": 3}, {"separate": True}, {"trunk": "own"}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("init", ["hyperfan_in", "hyperfan_out"])
def test_generated_weights_start_with_the_variance_of_ones_own(options, init):
    torch.manual_seed(0)
    if options.get("trunk"):
        options = {"trunk": nn.Sequential(nn.Linear(32, 200), nn.GELU())}
    hyper = HyperNet(32, 40, (60, 50), 30, hidden=200, init=init, **options)
    weights = hyper(torch.randn(300, 32))
    for w, b in zip(weights[::2], weights[1::2], strict=True):
        fan = w.shape[2 if init == "hyperfan_in" else 1]
        assert 0.8 < w.double().square().mean() * fan / 2 < 1.2  # ReLU's gain
        assert b.abs().max() < 1e-14


def test_all_tasks_start_as_the_base():
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3, bias=False))
    conv = nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Flatten())
    for module, x in ((net, torch.randn(B, N, 4)), (conv, torch.randn(B, N, 2, 6))):
        for separate in (False, True):
            hyper, target = HyperNet.for_module(module, Z, base="net", separate=separate)
            module.eval()
            model = HyperMLP(hyper, target).eval()
            torch.testing.assert_close(
                model(x, torch.randn(B, Z)),
                module(x.flatten(0, 1)).unflatten(0, (B, N)),
                rtol=1e-6, atol=1e-6,
            )  # fmt: skip
            flat = torch.cat([p.flatten() for p in module.parameters()])
            assert torch.equal(hyper.base, flat)
            for w, p in zip(hyper(torch.randn(B, Z)), module.parameters(), strict=True):
                assert torch.equal(w, p.expand_as(w))
    hyper.base.requires_grad_(False)
    model(x, torch.randn(B, Z)).sum().backward()
    assert hyper.base.grad is None
    assert any(p.grad.any() for p in hyper.generator.parameters())


def test_bias_hyper_init():
    hyper = HyperNet(Z, 4, 64, 3, base=True, rank=2)
    one, other = (hyper(torch.randn(Z)) for _ in range(2))
    assert all(map(torch.equal, one, other))
    assert 0.5 < one[0].var() * 4 / 2 < 2
    assert not one[1].any()


def test_state_dict_and_copies():
    hyper = make(bias=[True, "shared", False], base=True, rank=2)
    assert {k.split(".")[0] for k in hyper.state_dict()} == {"generator", "base", "biases"}
    other = make(bias=[True, "shared", False], base=True, rank=2)
    other.load_state_dict(hyper.state_dict())
    z = draw(2, Z)
    assert all(map(torch.equal, hyper(z), other(z)))
    assert [k for k in make().state_dict() if not k.startswith("generator.")] == []


@pytest.mark.parametrize("options", [{"rank": 2}, {"separate": True, "bias": "shared"}], ids=str)
def test_compiles(options):
    model = HyperMLP(make(**options))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, z = draw(B, N, 4), draw(B, Z)
    close(compiled(x, z), model(x, z))


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "bias must be one of", {"bias": "own"}),
        (ValueError, "bias must hold 3 entries, one a layer, got 2", {"bias": [True, False]}),
        (ValueError, "transform must be one of", {"transform": "sqrt"}),
        (ValueError, "rank must be at least 1", {"rank": 0}),
        (ValueError, "transform must be None for a matrix of rank 1",
         {"rank": 1, "transform": "abs"}),
        (ValueError, "transform must generate zeros", {"base": True, "transform": "softplus"}),
        (TypeError, "base must be a bool, got 'net'", {"base": "net"}),
        (TypeError, "trunk must be a module, got function", {"trunk": lambda z: z}),
        (ValueError, r"trunk must map \(2, 5\) to \(2, H\), got \(2, 5, 1\)",
         {"trunk": nn.Unflatten(1, (5, 1))}),
    ],
)  # fmt: skip
def test_bad_options(error, message, options):
    with pytest.raises(error, match=message):
        HyperNet(Z, SIZES[0], SIZES[1:-1], SIZES[-1], **options)


def test_bad_base():
    with pytest.raises(ValueError, match=r"base must be one of \[None, 'net'\], got True"):
        HyperNet.for_module(nn.Linear(3, 2), Z, base=True)


def test_parallel_needs_one_plain_head():
    for options in OPTIONS[1:-2]:
        with pytest.raises(TypeError, match="one head"):
            hyperfast.distributed.parallelize(HyperMLP(make(**options)), None)
    with pytest.raises(TypeError, match="mesh must be a DeviceMesh, got NoneType"):
        hyperfast.distributed.parallelize(HyperMLP(HyperNet(5, 4, 7, 3)), None)
