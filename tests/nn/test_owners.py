"""Every parameter of an activation has one owner: it is trained, saved and loaded once."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_model, save, save_model
from torch import nn

from hyperfast import HyperMLP, HyperNet, Sine, TargetNet

X, Z = torch.randn(6, 7, 4), torch.randn(6, 5)


def make(target=None, **options):
    return HyperMLP(HyperNet(5, 4, (8, 8), 3, **options), target)


def sequence(*activations):
    return nn.ModuleList(activations)


MODELS = {
    "target": lambda a: make(target_activation=a),
    "trunk": lambda a: make(activation=a),
    "layers of the trunk": lambda a: make(activation=a, hidden=(9, 8, 7)),
    "trunk and target": lambda a: make(activation=a, target_activation=a),
    "hyper and target": lambda a: make(TargetNet(a), target_activation=a),
    "trunk and target of one's own": lambda a: make(TargetNet(a), activation=a),
    "layers of the target": lambda a: make(TargetNet([a, a])),
    "inside other modules": lambda a: make(
        TargetNet([nn.Sequential(a), nn.Sequential(nn.Tanh(), a)])
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_one_activation_given_for_several_places(name, tmp_path):
    activation = nn.PReLU()
    model = MODELS[name](activation)
    assert any(p is activation.weight for p in model.parameters())  # the first place has the given
    state = model.state_dict(keep_vars=True)
    assert len({id(t) for t in state.values()}) == len(state) == len([*model.parameters()])
    save(model.state_dict())
    save_model(model, tmp_path / "model")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    want = model(X, Z)
    save_model(model, tmp_path / "model")
    other = MODELS[name](nn.PReLU())
    load_model(other, tmp_path / "model")
    for again in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(X, Z), want)
    model(X, Z).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_what_is_given_once_is_the_given():
    for activation in (nn.PReLU(), Sine(nn.Parameter(torch.tensor(3.0)))):
        hyper = HyperNet(5, 4, 8, 3, target_activation=activation)
        model = HyperMLP(hyper)
        assert model.target.activations[0] is activation is hyper.target_activation
        assert not [name for name, _ in hyper.named_parameters() if "activation" in name]
        hyper.target_activation = nn.Tanh()
        assert "target_activation" not in hyper._modules


def test_the_targets_activation_moves_with_the_hypernetwork():
    hyper = HyperNet(5, 4, 8, 3, target_activation=nn.PReLU()).double()
    assert HyperMLP(hyper)(X.double(), Z.double()).dtype == torch.float64


def test_old_state_dicts():
    """They held the target's activation twice; one of the hypernetwork alone held it as well."""
    model = make(target_activation=nn.PReLU(), activation=nn.PReLU())
    slope = torch.tensor([0.7])
    old = model.state_dict() | {
        "hyper.target_activation.weight": slope,
        "target.activations.0.weight": slope,
    }
    for options in ({}, {"assign": True}):
        other = make(target_activation=nn.PReLU(), activation=nn.PReLU())
        other.load_state_dict(old, **options)
        assert other.target.activations[0].weight == slope
    hyper = HyperNet(5, 4, (8, 8), 3, target_activation=nn.PReLU(), activation=nn.PReLU())
    hyper.load_state_dict(
        {key.removeprefix("hyper."): t for key, t in old.items() if key.startswith("hyper.")}
    )
    assert HyperMLP(hyper).target.activations[0].weight == slope
    named = make(target_activation="tanh", activation=nn.PReLU())
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"target\.activations\.0\.weight"'):
        named.load_state_dict(old)


def test_eval_reaches_the_targets_activation():
    hyper = HyperNet(5, 4, 8, 3, target_activation=nn.Dropout(0.5))
    target = TargetNet(hyper.target_activation)
    hyper.eval()
    x, weights = torch.randn(6, 7, 4), hyper(torch.randn(6, 5))
    assert torch.equal(target(x, weights), target(x, weights))
    hyper.train()
    assert target.activations[0].training
