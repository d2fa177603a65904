"""Global defaults of PyTorch are not a bank's: whatever they are, it lives where it was made."""

import copy
import os
import pickle

import pytest
import torch
from torch import nn

from hyperfast import HyperNet, MLPSpec, TargetNet, TaskBank, TaskServer
from hyperfast.bank.file import raw

SPEC = MLPSpec((5, 7, 3))


@pytest.fixture
def elsewhere():
    """Tensors made without a device are on "meta", as they would be on "cuda"; without a dtype,
    float64."""
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


def on_cpu(*shape, seed=0):
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32)


def make_hyper():
    torch.manual_seed(0)
    return HyperNet(4, 5, 7, 3, hidden=6, device="cpu", dtype=torch.float32)


def live(path, dtype, kwargs):
    """A bank's life; returns what it answers at its end."""
    hyper, z = make_hyper(), on_cpu(9, 4)
    bank = TaskBank.from_latents(
        hyper, z, dtype=dtype, keys=["ann", *range(8)], target=TargetNet(nn.Hardtanh()), **kwargs
    )
    ids = torch.tensor([8, 0, 3], device="cpu")
    before = bank.weights(ids)
    with pytest.raises(ValueError, match="a file can hold"):
        bank.save(path)
    bank = TaskBank.from_latents(hyper, z, dtype=dtype, keys=["ann", *range(8)], **kwargs)
    assert torch.equal(bank.weights(ids), before)
    bank.save(path)
    for verify in (False, True):
        opened = TaskBank.open(path, hyper=hyper, log=True, verify=verify)
        opened.add(on_cpu(3, 4, seed=1), keys=[f"{verify}.{n}" for n in range(3)])
        opened.update([1, 2], on_cpu(2, 4, seed=2))
        opened.remove([4 + verify])
        opened.close()
    bank = TaskBank.open(path, hyper=hyper, log=True)
    bank.save(path)
    if not kwargs:
        bank.add(weights=on_cpu(70, SPEC.numel))  # more than there was room for
    bank.close()
    bank = TaskBank.open(path, hyper=hyper)
    assert 4 not in bank
    assert bank.ids(["ann"]).tolist() == [0]
    assert torch.equal(bank.latents([0]), z[:1])
    assert bank.explain().tasks == len(bank)
    report = bank.error_report(ids=[0, 1, 2])
    module, ids = bank.module(), bank.ids()
    x = on_cpu(len(ids), 5)
    y = bank(x, ids)
    assert torch.equal(copy.deepcopy(bank)(x, ids), y)
    assert torch.equal(pickle.loads(pickle.dumps(bank))(x, ids), y)
    torch.testing.assert_close(module(x, ids), y)
    with TaskServer(bank) as server:
        futures = [server.submit(task, row) for task, row in zip(ids.tolist(), x, strict=True)]
        answers = [future.result(60) for future in futures]
        gone = server.submit(4, x[0])
        assert isinstance(gone.exception(60), IndexError)
    torch.testing.assert_close(torch.stack(answers), y)
    return ids.tolist(), y, bank.weights(ids), report.layers


@pytest.mark.parametrize(
    ("dtype", "kwargs"),
    [(torch.float32, {}), (torch.int8, {}), (torch.bfloat16, {}), (torch.int8, {"max_bytes": 400})],
    ids=["fp32", "int8", "bf16", "budget"],
)
def test_a_life(tmp_path, dtype, kwargs, request):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    want = live(tmp_path / "a" / "bank", dtype, kwargs)
    request.getfixturevalue("elsewhere")
    got = live(tmp_path / "b" / "bank", dtype, kwargs)
    assert got[0] == want[0]
    assert got[1].device.type == "cpu"
    assert torch.equal(got[1], want[1])
    assert torch.equal(got[2], want[2])
    assert got[3] == want[3]
    files = [sorted(os.listdir(tmp_path / name)) for name in "ab"]
    assert files[0] == files[1]


def test_only_memory_of_the_cpu_is_read():
    with pytest.raises(ValueError, match="on the CPU"):
        raw(torch.empty(3, device="meta"))
    with pytest.raises(ValueError, match="contiguous"):
        raw(torch.empty(3, 4).mT)
