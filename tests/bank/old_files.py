"""Banks in files of an earlier release, whose description spelt out sizes, bias and activations.

The files in ``data/`` were written by ``python old_files.py FOLDER`` with that release. Their
content follows from formulas with exact values, so that a test knows it without a file."""

import sys
from pathlib import Path

import torch

from hyperfast import HyperNet, MLPSpec, TargetNet, TaskBank

DATA = Path(__file__).parent / "data"
SPEC = MLPSpec((5, 7, 3))


def exact(*shape, step):
    numel = torch.Size(shape).numel()
    return ((torch.arange(numel) * step % 101 - 50) / 64).view(shape)


def make_hyper():
    hyper = HyperNet(4, 5, 7, 3, hidden=6, target_activation="tanh")
    with torch.no_grad():
        for n, p in enumerate(hyper.parameters()):
            p.copy_(exact(*p.shape, step=29 + 2 * n))
    return hyper


def z(count):
    return exact(count, 4, step=31)


def make():
    """The banks by the names of their files; they are changed before they are saved."""
    hyper, flat = make_hyper(), exact(9, SPEC.numel, step=37)
    keyed = TaskBank.from_latents(hyper, z(9), keys=["ann", *range(8)])
    keyed.add(weights=flat[:2])
    target = TargetNet(["gelu", "sigmoid"])
    int8 = TaskBank.from_weights(SPEC, flat, dtype=torch.int8, keys=range(9), target=target)
    plain = MLPSpec((5, 7, 3), bias=False)
    softplus = TaskBank.from_weights(plain, flat[:, : plain.numel], target=TargetNet("softplus"))
    budget = TaskBank.from_latents(hyper, z(9), dtype=torch.int8, max_bytes=400)
    banks = {"fp32": keyed, "int8": int8, "no_bias": softplus, "budget": budget}
    for bank in banks.values():
        bank.remove([3, 5])
    return banks


def log(bank):
    """Changes that the file of ``fp32`` has in its log."""
    bank.add(z(2), keys=["eve", "bob"])
    bank.update([1], weights=exact(1, SPEC.numel, step=41))
    bank.remove(bank.ids(["ann"]))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for name, bank in make().items():
        bank.save(folder / name)
    bank = TaskBank.open(folder / "fp32", hyper=make_hyper(), log=True)
    log(bank)
    bank.close()
