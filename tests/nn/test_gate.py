"""What a user does to a model after it was built: it must still equal ``target(x, hyper(z))``."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import hyperfast
from hyperfast import HyperMLP, HyperNet, TaskBank
from hyperfast.plans.cpu import EXTENSION, EXTENSION_ERROR
from tests.support.cases import close
from tests.support.replaced import as_attribute, as_buffer

GENERATOR = torch.Generator().manual_seed(0)
X, Z = (torch.randn(6, n, generator=GENERATOR, dtype=torch.float64) for n in (4, 5))
ROWS = torch.randn(6, 7, 4, generator=GENERATOR, dtype=torch.float64)
IDS = torch.tensor([1, 0, 0, 5, 1, 1])


def make(cls=HyperNet, **options):
    torch.manual_seed(0)
    return HyperMLP(cls(5, 4, 8, 3, target_activation="tanh", dtype=torch.float64, **options))


class Residual(nn.Sequential):
    """A Sequential by its children, and not by what it computes."""

    def forward(self, z):
        h = self[0](z)
        return self[2](h + torch.relu(h))


class Adapter(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.up = base, nn.Linear(base.in_features, base.out_features).double()

    def forward(self, h):
        return self.base(h) + self.up(h)


class Tripled(HyperNet):
    def __call__(self, z):
        return tuple(3 * w for w in super().__call__(z))


class OtherFeatures(HyperNet):
    def features(self, z):
        return torch.zeros_like(super().features(z))


class Doubling(torch.Tensor):
    """A weight with a product of its own, as quantised tensors are."""

    @classmethod
    def __torch_function__(cls, fn, types, args=(), kwargs=None):
        if fn is F.linear:
            x, weight, bias = (a.as_subclass(torch.Tensor) for a in args)
            return fn(x, 2 * weight, bias)
        return super().__torch_function__(fn, types, args, kwargs or {})


def replace(of):
    def change(model):
        model.hyper.generator = of(model.hyper.generator)

    return change


def change_head(of):
    def change(model):
        model.hyper.generator[-1] = of(model.hyper.head)

    return change


def own_forward(model):
    generator = model.hyper.generator
    forward = generator.forward
    generator.forward = lambda z: 2 * forward(z)


def own_weight(model):
    head = model.hyper.head
    head.weight = nn.Parameter(head.weight.detach().as_subclass(Doubling))


CHANGES = {
    "subclass of Sequential": replace(lambda g: Residual(*g)),
    "one linear layer": replace(lambda g: nn.Linear(5, g[-1].out_features).double()),
    "an activation at the end": replace(lambda g: g.append(nn.Tanh())),
    "forward of the instance": own_forward,
    "adapter": change_head(Adapter),
    "subclass of Linear": change_head(lambda head: Twice.of(head)),
    "tensor subclass": own_weight,
    "tensor subclass that is no parameter": lambda model: as_attribute(
        model.hyper.head, "weight", model.hyper.head.weight.detach().as_subclass(Doubling)
    ),
    "parametrised": lambda model: parametrizations.orthogonal(model.hyper.head),
}


class Twice(nn.Linear):
    @classmethod
    def of(cls, head):
        other = cls(head.in_features, head.out_features).double()
        other.load_state_dict(head.state_dict())
        return other

    def forward(self, h):
        return 2 * super().forward(h)


def check(model, *others):
    """Value and gradients, of rows by task, of one row a task, and of mixed rows."""
    for x, ids in ((ROWS, []), (X, []), (X, [IDS])):
        leaves = [*others, *model.parameters()]
        got, want = model(x, Z, *ids), model.target(x, model.hyper(Z), *ids)
        close(got, want)
        for a, b in zip(
            torch.autograd.grad(got.square().sum(), leaves),
            torch.autograd.grad(want.square().sum(), leaves),
            strict=True,
        ):
            close(a, b)


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_generator_runs_as_written(name):
    model = make()
    before = model(ROWS, Z)
    CHANGES[name](model)
    assert not model.fused
    assert name == "parametrised" or not torch.allclose(model(ROWS, Z), before)
    check(model)


@pytest.mark.parametrize("cls", [Tripled, OtherFeatures])
def test_subclasses_of_hypernet(cls):
    check(make(cls))


def test_a_patched_class(monkeypatch):
    model = make()
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, h: 2 * forward(self, h))
    check(model)


def test_the_trunk_may_be_anything():
    """It is called, module by module, and the rest stays fused."""
    model = make()
    first, activation, head = model.hyper.generator
    model.hyper.generator = nn.Sequential(nn.Sequential(first, activation), nn.LayerNorm(64), head)
    model.double()
    assert model.fused
    check(model)


def ops_of(model, *args):
    """The ops of this library that run."""
    with torch.profiler.profile() as profile:
        model(*args)
    keys = [e.key.split("::") for e in profile.key_averages()]
    return {key[1] for key in keys if key[0] == "hyperfast"}


def networks_of(model, *args):
    """Those of whole networks: without the extension their layers are ops, too."""
    return ops_of(model, *args) & {"trunk_mlp", "hyper_mlp"}


def trunk(*modules):
    """The model with these modules before its head; None stands for its own first layer."""

    def change(model):
        first, _, head = model.hyper.generator
        own = [first if m is None else m for m in modules]
        model.hyper.generator = nn.Sequential(*own, head).double()

    return change


def first(change):
    """A change of the first layer in place, or of what stands there."""

    def of(model):
        other = change(model.hyper.generator[0])
        if isinstance(other, nn.Module):
            model.hyper.generator[0] = other

    return of


def hooked(module):
    module.register_forward_hook(lambda module, given, y: 2 * y)


PLAIN_TRUNKS = {
    "as built": lambda model: None,
    "deep": trunk(None, nn.Tanh(), nn.Linear(64, 7), nn.SiLU(), nn.Linear(7, 64), nn.ReLU()),
    "linear at the end": trunk(None, nn.GELU(approximate="tanh"), nn.Linear(64, 64)),
    "linear twice": trunk(None, nn.Linear(64, 64), hyperfast.Sine(3.0)),
    "without biases": trunk(nn.Linear(5, 64, bias=False), nn.ReLU()),
    "identity": trunk(None, nn.Identity()),
    "tied": lambda model: model.hyper.generator.insert(2, twin(model.hyper.generator)),
}
OTHER_TRUNKS = {
    "hook": first(hooked),
    "hook of the activation": lambda model: hooked(model.hyper.generator[1]),
    "subclass of Linear": first(lambda layer: Twice.of(layer)),
    "parametrised": first(lambda layer: parametrizations.orthogonal(layer) and None),
    "pruned": first(lambda layer: prune.l1_unstructured(layer, "weight", 0.5) and None),
    "forward of the instance": first(
        lambda layer: vars(layer).update(
            forward=lambda z: 2 * F.linear(z, layer.weight, layer.bias)
        )
    ),
    "tensor subclass": first(
        lambda layer: vars(layer)["_parameters"].update(
            weight=nn.Parameter(layer.weight.detach().as_subclass(Doubling))
        )
    ),
    "an activation with a parameter": trunk(None, nn.PReLU()),
    "two activations": trunk(None, nn.ReLU(), nn.Tanh()),
    "an activation first": trunk(nn.Tanh(), None),
    "a norm": trunk(None, nn.LayerNorm(64), nn.ReLU()),
    "a chain inside": trunk(nn.Sequential(nn.Linear(5, 64), nn.ReLU())),
    "none": lambda model: trunk()(model) or widen(model),
}


def twin(generator):
    """A second layer that shares its bias with the first."""
    layer = nn.Linear(64, 64).double()
    layer.bias = generator[0].bias
    return layer


def widen(model):
    model.hyper.generator[-1] = nn.Linear(5, model.hyper.spec.numel).double()


@pytest.mark.skipif(EXTENSION is None, reason=EXTENSION_ERROR)
@pytest.mark.parametrize("name", PLAIN_TRUNKS)
def test_a_plain_trunk_runs_in_the_op(name):
    model = make()
    PLAIN_TRUNKS[name](model)
    for args in ((ROWS, Z), (X, Z), (X, Z, IDS), (ROWS[:1], Z)):
        assert ops_of(model, *args) == {"trunk_mlp"}
        with torch.no_grad():
            assert ops_of(model, *args) == {"trunk_mlp"}
    check(model)


@pytest.mark.parametrize("name", OTHER_TRUNKS)
def test_any_other_trunk_is_called(name):
    model = make()
    OTHER_TRUNKS[name](model)
    assert model.fused
    assert networks_of(model, ROWS, Z) == {"hyper_mlp"}
    check(model)


@pytest.mark.parametrize("put", [as_attribute, as_buffer])
@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("layer", [0, -1], ids=["trunk", "head"])
def test_a_tensor_that_is_no_parameter(layer, name, put):
    """What meta-learning puts in a parameter's place."""
    model = make()
    layer = model.hyper.generator[layer]
    other = torch.randn_like(getattr(layer, name)).requires_grad_()
    put(layer, name, other)
    assert model.fused
    check(model, other)


def replica(module):
    """What ``nn.DataParallel`` calls on every device: its parameters are attributes."""
    other = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        other._modules[name] = replica(child)
    for name, p in module._parameters.items():
        if p is None:
            other._parameters[name] = None
        else:
            setattr(other, name, p.view_as(p))
    return other


@pytest.mark.parametrize("change", ["as built", "without biases"])
def test_a_replica(change):
    model = make()
    PLAIN_TRUNKS[change](model)
    for args in ((ROWS, Z), (X, Z), (X, Z, IDS)):
        leaves = [*model.parameters()]
        got, want = replica(model)(*args), model(*args)
        close(got, want)
        for a, b in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (got, want)), strict=True):
            close(a, b)


def test_a_trunk_of_another_kind():
    """Layout, device and dtype are as PyTorch takes them."""
    model = make()
    layer, want = model.hyper.generator[0], model(ROWS, Z).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its state
        sparse = layer.weight.detach().to_sparse_csr()
    own = layer.weight
    layer.weight = nn.Parameter(sparse, requires_grad=False)
    close(model(ROWS, Z), want)
    layer.weight = own
    layer.float()
    with pytest.raises(RuntimeError, match="same dtype"):
        model(ROWS, Z)
    layer.to("meta", torch.float64)
    with pytest.raises(RuntimeError, match="meta"):
        model(ROWS, Z)


def test_a_patched_activation_is_called(monkeypatch):
    model = make()
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, h: torch.tanh(h))
    assert networks_of(model, ROWS, Z) == {"hyper_mlp"}
    check(model)


def test_a_global_hook_sees_the_trunk():
    model, seen = make(), []
    hook = nn.modules.module.register_module_forward_hook(lambda *args: seen.append(args[0]))
    try:
        model(ROWS, Z)
    finally:
        hook.remove()
    assert model.hyper.generator[0] in seen


def test_where_the_trunk_does_not_run_in_the_op():
    model = make()
    with hyperfast.use_backend("reference"):
        assert not networks_of(model, ROWS, Z)
    with torch.autocast("cpu", torch.bfloat16):
        assert networks_of(model.float(), ROWS.float(), Z.float()) == {"hyper_mlp"}
    model.double()
    want = model(ROWS, Z)
    several = torch.vmap(lambda z: model(ROWS, z))(torch.stack([Z, Z]))  # it has no rule for that
    close(several, torch.stack([want, want]))
    large = make(hidden=(120, 120))
    assert networks_of(large, ROWS, Z) == {"hyper_mlp"}
    check(large)


def test_a_head_without_bias_is_fused():
    model = make()
    model.hyper.generator[-1] = nn.Linear(64, model.hyper.spec.numel, bias=False).double()
    assert model.fused
    check(model)


def test_there_is_no_head_in_a_generator_of_ones_own():
    hyper = make().hyper
    hyper.generator = Residual(*hyper.generator)
    assert not hasattr(hyper, "head")
    for call in (lambda: hyper.features(Z), hyper.reset_parameters):
        with pytest.raises(TypeError, match=r"generator must be an nn\.Sequential.* got Residual"):
            call()


def test_what_cannot_be_initialised_is_refused():
    hyper = make().hyper
    parametrizations.orthogonal(hyper.head)
    with pytest.raises(TypeError, match=r"(?s)weights of their own.*Parametrized"):
        hyper.reset_parameters()


@pytest.mark.parametrize("where", ["head", "trunk"])
def test_a_computed_weight_is_computed_once(where):
    class Count(nn.Module):
        calls = 0

        def forward(self, weight):
            self.calls += 1
            return weight

    model, count = make(), Count()
    layer = model.hyper.head if where == "head" else model.hyper.generator[0]
    parametrize.register_parametrization(layer, "weight", count)
    for args in ((ROWS, Z), (X, Z, IDS), (X, Z[0])):
        count.calls = 0
        model(*args)
        assert count.calls == 1
    count.calls = 0
    assert (model.hyper.dtype, model.hyper.device.type) == (torch.float64, "cpu")
    assert count.calls == 0


def test_quantised():
    model = make().float().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its replacement
        small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    x, z = X.float(), Z.float()
    assert not small.fused
    flat = small.hyper.generator(z)
    close(small(x, z[0]), small(x, z[:1].expand(6, -1)), 1e-5)
    close(small(x, z, IDS), model.target(x, model.hyper.spec.split(flat), IDS), 1e-6)
    assert (small(x, z) - model(x, z)).norm() < 0.1 * model(x, z).norm()
    bank = TaskBank.from_latents(small.hyper, z)
    close(bank(x, IDS), small(x, z, IDS), 1e-5)
    with pytest.raises(TypeError, match=r"z must be a floating-point tensor, got torch.int64"):
        small(x, z.long())


def norm_by_hook(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(module)


@pytest.mark.parametrize(
    "change",
    [
        lambda hyper: prune.l1_unstructured(hyper.head, "weight", 0.5),
        lambda hyper: prune.random_unstructured(hyper.generator[0], "weight", 0.5),
        lambda hyper: norm_by_hook(hyper.head),
        lambda hyper: hyper.generator.append(Adapter(hyper.generator.pop(-1))),
    ],
    ids=["pruned", "pruned trunk", "weight_norm", "adapter"],
)
def test_a_bank_of_a_changed_hypernetwork(change, tmp_path):
    model = make(bias=False)
    change(model.hyper)
    check(model)
    bank = TaskBank.from_latents(model.hyper, Z)
    close(bank(X, IDS), model(X, Z, IDS).detach())
    bank.explain(), bank.error_report()
    bank.save(tmp_path / "bank")
    again = TaskBank.open(tmp_path / "bank", hyper=model.hyper)
    again.add(Z[:1])
    assert torch.equal(again(X, IDS), bank(X, IDS))


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, norm_by_hook])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weight_norm_of_a_fresh_head(norm, dtype):
    """Rows that generate biases start next to zero, not at it: 0 / 0 would be NaN."""
    model = make().to(dtype)
    model.hyper.reset_parameters()
    biases = [b for w, b in zip(*[iter(model.hyper(Z.to(dtype)))] * 2, strict=True)]
    assert max(b.abs().max() for b in biases) < 2 * torch.finfo(dtype).eps
    norm(model.hyper.head)
    y = model(X.to(dtype), Z.to(dtype))
    y.float().square().sum().backward()
    assert y.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.hyper.parameters())
    if dtype == torch.float64:
        check(model)


def test_copies_of_a_pruned_hypernetwork_are_its_own():
    hyper = make().hyper
    prune.l1_unstructured(hyper.head, "weight", 0.5)
    hyper(Z)
    other = hyperfast.nn.copies.clone(hyper)
    close(other(Z), hyper(Z))
    with torch.no_grad():
        other.head.weight_orig.zero_()
    assert other(Z)[0].abs().sum() == 0
    assert hyper(Z)[0].abs().sum() > 0
    copy.deepcopy(make())  # and what is not pruned is copied as ever
