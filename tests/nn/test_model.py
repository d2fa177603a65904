"""HyperNet and HyperMLP as ordinary modules: autocast, copies, files, devices, parametrisations."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import hyperfast
from hyperfast import functional
from tests.support.budget import assert_as_good, close, norm


@pytest.fixture
def model():
    hyper = hyperfast.HyperNet(5, 4, 8, 3, target_activation="tanh")
    return hyperfast.HyperMLP(hyper)


GENERATOR = torch.Generator().manual_seed(0)
X, Z = (torch.randn(6, n, generator=GENERATOR) for n in (4, 5))
IDS = torch.tensor([1, 0, 0, 5, 1, 1])


class TestAutocast:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("ids", [None, IDS], ids=["batched", "ragged"])
    def test_output_and_gradients(self, model, ids, dtype):
        """Within twice the error of the specification under autocast, and a few roundings."""
        leaves = [X.clone().requires_grad_(), *model.parameters()]

        def run():
            y = model(leaves[0], Z, ids)
            return y, *torch.autograd.grad(y.float().square().sum(), leaves)

        exact = run()
        with torch.autocast("cpu", dtype):
            cast = run()
            with hyperfast.use_backend("reference"):
                reference = run()
        assert cast[0].dtype == dtype
        assert all(g.dtype == torch.float32 for g in cast[1:])
        for a, b, c in zip(exact, cast, reference, strict=True):
            assert_as_good(b, c, a, roundings=4, size=norm, cast=dtype)

    def test_mixed_dtypes_are_cast(self, model):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(X.bfloat16(), Z)
            assert torch.equal(y, model(X, Z))
            weights = model.hyper(Z.bfloat16())
            assert {w.dtype for w in weights} == {torch.bfloat16}
            assert model.target(X, weights).dtype == torch.bfloat16

    def test_unbatched(self, model):
        with torch.autocast("cpu", torch.bfloat16):
            assert model(X, Z[0]).dtype == torch.bfloat16

    def test_like_linear(self):
        """fp32 is cast, fp64 is not: as F.linear does."""
        h, w = torch.randn(2, 7), torch.randn(12, 7)
        x, task_weight = torch.randn(2, 3), torch.randn(2, 5, 3)
        with torch.autocast("cpu", torch.bfloat16):
            for t in (torch.float32, torch.float64):
                like = nn.functional.linear(h.to(t), w.to(t)).dtype
                args = [a.to(t) for a in (x, h, w)]
                assert functional.hyper_linear(*args, None).dtype == like
                assert functional.task_linear(x.to(t), task_weight.to(t)).dtype == like

    def test_disabled_inside(self, model):
        with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
            assert model(X, Z).dtype == torch.float32

    def test_compiled(self, model, dynamo):
        with torch.autocast("cpu", torch.bfloat16):
            y = torch.compile(model, fullgraph=True, backend="aot_eager")(X, Z)
            assert torch.equal(y, model(X, Z))


def test_deepcopy_is_independent(model):
    y = model(X, Z)
    other = copy.deepcopy(model)
    assert torch.equal(other(X, Z), y)
    with torch.no_grad():
        other.hyper.head.weight.zero_()
    assert torch.equal(model(X, Z), y)


def test_pickle(model):
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(X, Z), model(X, Z))
    assert again.hyper.spec == model.hyper.spec


@pytest.mark.parametrize(
    "activation",
    ["sin", hyperfast.Sine(30.0), torch.tanh, nn.PReLU()],
    ids=["name", "sine", "fn", "prelu"],
)
def test_pickle_activations(activation):
    options = {"activation": activation, "target_activation": activation}
    model = hyperfast.HyperMLP(hyperfast.HyperNet(5, 4, 8, 3, **options))
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(again(X, Z), model(X, Z))


def test_state_dict_round_trip(model):
    torch.manual_seed(1)
    other = hyperfast.HyperMLP(hyperfast.HyperNet(5, 4, 8, 3, target_activation="tanh"))
    assert not torch.equal(other(X, Z), model(X, Z))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(X, Z), model(X, Z))
    assert set(model.state_dict()) == {
        f"hyper.generator.{n}.{p}" for n in (0, 2) for p in ("weight", "bias")
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_to_dtype(model, dtype):
    x, z = X.to(dtype), Z.to(dtype)
    y = model.to(dtype)(x, z)
    assert y.dtype == dtype
    with hyperfast.use_backend("reference"):
        plain = model(x, z)
        exact = model.double()(x.double(), z.double())
    assert_as_good(y, plain, exact, size=norm)


@pytest.mark.parametrize("how", ["argument", "context"])
def test_meta(how):
    if how == "argument":
        hyper = hyperfast.HyperNet(5, 4, 8, 3, device="meta")
    else:
        with torch.device("meta"):
            hyper = hyperfast.HyperNet(5, 4, 8, 3)
    model = hyperfast.HyperMLP(hyper)
    for ids in (None, IDS.to("meta")):
        y = model(X.to("meta"), Z.to("meta"), ids)
        assert y.shape == (6, 3)
        y.sum().backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())
    model.to_empty(device="cpu")
    hyper.reset_parameters()
    assert model(X, Z).isfinite().all()


def test_fake_tensors(model):
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = model(mode.from_tensor(X), mode.from_tensor(Z))
    assert y.shape == (6, 3)


@pytest.mark.parametrize(
    "change",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        lambda head: prune.l1_unstructured(head, "weight", 0.5),
    ],
    ids=["weight_norm", "spectral_norm", "pruned"],
)
def test_a_changed_head(change):
    """The head's weight may be computed rather than stored."""
    model = hyperfast.HyperMLP(hyperfast.HyperNet(5, 4, 8, 3, bias=False))
    before = model(X, Z)
    change(model.hyper.head)
    with torch.no_grad():
        for p in model.hyper.head.parameters():
            p.mul_(1.5)
    model.eval()
    y = model(X, Z)
    assert not torch.allclose(y, before)
    close(y, model.target(X, model.hyper(Z)), 1e-5)
    y.sum().backward()
    assert all(p.grad is not None for p in model.hyper.head.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(model, mode):
    with mode():
        y = model(X, Z)
    assert not y.requires_grad
    close(y, model(X, Z).detach(), 1e-6)


def test_checkpointing(model):
    x = X.clone().requires_grad_()
    gradient = torch.autograd.grad(model(x, Z).sum(), [x, *model.parameters()])
    y = torch.utils.checkpoint.checkpoint(model, x, Z, use_reentrant=False)
    close(torch.autograd.grad(y.sum(), [x, *model.parameters()]), gradient, 1e-6)


def test_partly_frozen(model):
    """Only what wants a gradient gets one."""
    model.hyper.head.requires_grad_(False)
    z = Z.clone().requires_grad_()
    model(X, z).sum().backward()
    assert model.hyper.head.weight.grad is None
    assert z.grad.abs().sum() > 0


def test_a_target_that_is_no_mlp(model):
    """Any module that takes (x, weights, task_ids) can be a target; the weights are formed."""

    class Sum(nn.Module):
        def forward(self, x, weights, task_ids):
            return x.sum() + sum(w.sum() for w in weights)

    other = hyperfast.HyperMLP(model.hyper, Sum())
    assert not other.fused
    close(other(X, Z), X.sum() + model.hyper.generator(Z).sum(), 1e-5)
