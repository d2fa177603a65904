"""Banks of networks whose matrices are transformed when they are applied."""

import copy

import pytest
import torch

import hyperfast
from hyperfast import HyperNet, TargetNet, TaskBank
from tests.support.draw import draw

IDS = torch.tensor([3, 0, 0, 5, 1])


@pytest.mark.parametrize("activation", ["elu", torch.atan], ids=["op", "layers"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("bias", [True, [True, False]], ids=str)
def test_a_bank_runs_what_its_target_does(activation, dtype, bias, tmp_path):
    of = torch.float32 if dtype == torch.int8 else dtype
    hyper = HyperNet(5, 4, 7, 3, bias=bias, dtype=of)
    target = TargetNet(activation, weight_transform="abs")
    z, x = draw(6, 5, dtype=of), draw(5, 4, dtype=of)
    bank = TaskBank.from_latents(hyper, z, target=target, dtype=dtype)
    given = bank.weights(range(6))
    expected = target(x, bank.spec.split(given), IDS)
    assert (given < 0).any()
    torch.testing.assert_close(bank(x, IDS), expected)
    again = TaskBank.from_weights(bank.spec, given, target=target, dtype=dtype)
    for twin in (copy.deepcopy(bank), again):
        torch.testing.assert_close(twin(x, IDS), expected)
    torch.testing.assert_close(bank.module()(x, IDS), expected)
    if activation == "elu":
        bank.save(tmp_path / "bank")
        opened = TaskBank.open(tmp_path / "bank", hyper=hyper)
        torch.testing.assert_close(opened(x, IDS), expected)
        (new,) = opened.add(z=z[:1])
        torch.testing.assert_close(opened(x[:1], torch.tensor([new])), bank(x[:1], IDS[1:2]))
    assert torch.isfinite(torch.tensor([e.output_max for e in bank.error_report().layers])).all()


def test_a_generated_transform_is_in_the_weights():
    hyper = HyperNet(5, 4, 7, 3, transform="square", target_activation="tanh")
    z, x = torch.randn(6, 5), torch.randn(5, 4)
    bank = TaskBank.from_latents(hyper, z)
    assert all((w >= 0).all() for w in bank.spec.split(bank.weights(range(6)))[::2])
    torch.testing.assert_close(bank(x, IDS), hyperfast.HyperMLP(hyper)(x, z, IDS))


def test_a_function_has_no_name_for_a_bank():
    with pytest.raises(ValueError, match="weight_transform with a name"):
        TaskBank.from_latents(
            HyperNet(5, 4, 7, 3), torch.randn(2, 5), target=TargetNet(weight_transform=torch.sin)
        )
