"""A bank owns what it holds, and so does each copy of it."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from hyperfast import HyperMLP, HyperNet, MLPSpec, Sine, TargetNet, TaskBank, TaskServer

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8]


def torch_save(bank):
    file = io.BytesIO()
    torch.save(bank, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda bank: pickle.loads(pickle.dumps(bank)),
    "torch.save": torch_save,
}


@pytest.fixture
def hyper():
    return HyperNet(5, 4, 8, 3)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kwargs", [{}, {"dtype": torch.int8}, {"max_bytes": 3 * 67 * 4}], ids=repr)
def test_a_copy_is_a_bank_of_its_own(hyper, way, kwargs):
    z = torch.randn(9, 5)
    target = TargetNet(nn.PReLU())
    bank = TaskBank.from_latents(hyper, z, keys=["ann", *range(8)], target=target, **kwargs)
    bank.remove([3, 5])
    bank.add(z[:1], keys=["eve"])
    ids = bank.ids()
    x = torch.randn(len(ids), 4)
    y = bank(x, ids)
    twin = WAYS[way](bank)
    assert torch.equal(twin.ids(), ids)
    torch.testing.assert_close(twin(x, ids), y)
    assert twin.keys == bank.keys
    assert torch.equal(twin.latents(ids), bank.latents(ids))
    assert (twin.spec, twin.dtype, twin.max_bytes) == (bank.spec, bank.dtype, bank.max_bytes)
    # What one does, the other does not see; and both go on alike.
    assert twin.add(z[:3], keys=[20, 21, 22]).tolist() == bank.add(z[:3]).tolist()
    twin.update([0], z[1:2])
    twin.remove([1])
    with torch.no_grad():
        for module in (twin.hyper, *filter(None, twin.contents.activations)):
            for p in module.parameters():
                p.zero_()
    torch.testing.assert_close(bank(x, ids), y)
    assert 20 not in bank.keys
    assert torch.equal(twin.contents.table.ids()[:1], ids[:1])


def test_a_copy_reuses_rows(hyper):
    twin = copy.deepcopy(TaskBank.from_latents(hyper, torch.zeros(50, 5)))
    for _ in range(20):
        twin.remove(twin.ids()[:40])
        twin.add(torch.zeros(40, 5))
    assert twin.contents.table.weights.slots <= 200


def test_a_copy_has_no_log(hyper, tmp_path):
    path = tmp_path / "b"
    TaskBank.from_latents(hyper, torch.zeros(6, 5)).save(path)
    bank = TaskBank.open(path, hyper=hyper, log=True)
    bank.add(torch.ones(1, 5))
    before = (tmp_path / "b.log").read_bytes()
    twin = pickle.loads(pickle.dumps(bank))
    twin.add(torch.ones(1, 5))
    twin.close()
    assert (tmp_path / "b.log").read_bytes() == before
    bank.add(torch.ones(2, 5))
    bank.close()
    assert (len(twin), len(TaskBank.open(path))) == (8, 9)


def test_copies_in_inference_mode(hyper):
    bank = TaskBank.from_latents(hyper, torch.zeros(6, 5))
    with torch.inference_mode():
        twins = [way(bank) for way in WAYS.values()]
    for twin in twins:
        twin.update([0], torch.ones(1, 5))
        twin.add(torch.ones(99, 5))


def test_a_server_is_not_copied(hyper):
    with TaskServer(TaskBank.from_latents(hyper, torch.zeros(6, 5))) as server:
        for way in WAYS.values():
            with pytest.raises(TypeError, match="TaskServer cannot be copied"):
                way(server)


# Activations


def test_dropout_does_not_drop(hyper):
    target = TargetNet(nn.Sequential(nn.ReLU(), nn.Dropout(0.5)))
    bank = TaskBank.from_latents(hyper, torch.randn(6, 5), target=target)
    x, ids = torch.randn(30, 4), torch.randint(6, (30,))
    y = bank(x, ids)
    assert torch.equal(bank(x, ids), y)
    torch.testing.assert_close(bank.module()(x, ids), y)
    assert target.training
    assert bank.error_report().layers == bank.error_report().layers


class Shift(nn.Module):
    """Has a tensor that is neither parameter nor buffer."""

    def __init__(self):
        super().__init__()
        self.by = torch.tensor([0.25])

    def forward(self, x):
        return x.sin() + self.by


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "make",
    [
        *(nn.PReLU, lambda: nn.PReLU(8), lambda: nn.BatchNorm1d(8), lambda: nn.LayerNorm(8)),
        *(Shift, lambda: Sine(nn.Parameter(torch.tensor(3.0)))),
    ],
    ids=["PReLU", "PReLU(8)", "BatchNorm", "LayerNorm", "tensor", "Sine"],
)
def test_activations_in_the_dtype_of_the_bank(hyper, dtype, make):
    target = TargetNet(make())
    for module in target.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.running_mean)
    z, x, ids = torch.randn(6, 5), torch.randn(30, 4), torch.randint(6, (30,))
    bank = TaskBank.from_latents(hyper, z, dtype=dtype, target=target)
    want = copy.deepcopy(target).eval()(x, hyper(z), ids).detach()
    for call in (bank, bank.module()):
        y = call(x, ids)
        assert y.dtype == x.dtype
        assert float((y.detach() - want).norm()) < 0.05 * float(want.norm())
    assert bank.error_report().layers[-1].output_relative < 0.05


def test_a_module_shares_nothing():
    hyper = HyperNet(5, 4, 8, 3, target_activation=nn.PReLU())
    z, x, ids = torch.randn(6, 5), torch.randn(30, 4), torch.randint(6, (30,))
    bank = TaskBank.from_latents(hyper, z)
    y, module = bank(x, ids), bank.module()
    assert not module.training
    with torch.no_grad():
        for p in [*module.parameters(), *hyper.parameters()]:
            p.fill_(0.9)
    for _ in range(2):
        assert torch.equal(bank(x, ids), y)
        module.double()
    other = bank.module()
    with torch.no_grad():
        bank.contents.activations[0].weight.fill_(0.5)
    torch.testing.assert_close(other(x, ids), y)


# Hypernetworks that PyTorch does not copy, or not alike


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["pruned", "weight_norm", "parametrised"])
def test_computed_weights(hyper, kind):
    if kind == "pruned":
        prune.l1_unstructured(hyper.head, "weight", 0.5)
    elif kind == "weight_norm":
        torch.nn.utils.weight_norm(hyper.generator[0])
    else:
        parametrize.register_parametrization(hyper.head, "weight", nn.Tanh())
    z, x, ids = torch.randn(6, 5), torch.randn(30, 4), torch.randint(6, (30,))
    want = HyperMLP(hyper)(x, z, ids).detach()
    for kwargs in ({}, {"max_bytes": 3 * 67 * 4}):
        bank = TaskBank.from_latents(hyper, z, **kwargs)
        torch.testing.assert_close(bank(x, ids), want)
        torch.testing.assert_close(copy.deepcopy(bank)(x, ids), want)
        assert bank.error_report().layers[0].weight_relative < 1e-6
    with torch.no_grad():
        for p in hyper.parameters():
            p.zero_()
    torch.testing.assert_close(bank.weights(bank.add(z[:1])), bank.weights([0]))


class Stuck(nn.ReLU):
    def __deepcopy__(self, memo):
        raise RuntimeError("never")


def test_what_cannot_be_copied_is_named():
    hyper = HyperNet(5, 4, 8, 3, activation=Stuck())
    with pytest.raises(TypeError, match="hyper must be such that it can be copied"):
        TaskBank.from_latents(hyper, torch.zeros(6, 5))
    with pytest.raises(TypeError, match="target must be such that it can be copied"):
        TaskBank.from_weights(MLPSpec((2, 2, 1)), torch.zeros(1, 9), target=TargetNet(Stuck()))
