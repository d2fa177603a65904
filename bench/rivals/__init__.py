"""The registry: every entry of the race, in the order in which tables show them."""

from __future__ import annotations

from bench.absent import Unavailable
from bench.rivals.bank import BANK_RIVALS
from bench.rivals.jax import JAX_RIVAL
from bench.rivals.ours import HYPERFAST
from bench.rivals.packages import PACKAGES
from bench.rivals.plain import TORCH_RIVALS
from bench.rivals.rival import Call, Rival
from bench.workloads import MLP, BankWorkload

RIVALS = {r.name: r for r in (*HYPERFAST, *TORCH_RIVALS, JAX_RIVAL, *PACKAGES)}

# Ratios are taken to this entry.
OURS = "hyperfast"

NO_BANK = {
    "hyperfast compiled": "the eager entry is one op: nothing is left to fuse",
    "vmap": "takes the gathered weights of every row, as bmm does, and calls the same bmm",
    "bmm by layer compiled": "no weights are generated here: the same as bmm compiled",
    "bmm by layer compiled bf16": "no weights are generated here: the same as bmm compiled",
    "bmm bf16": "the copies of gathered weights are timed in float32",
    "hypnettorch": "keeps no bank: its target takes the weights of one task a call",
    "hyperlight": "keeps no bank: its target takes the weights of one task a call",
    "hyper-nn": "keeps no bank: its target takes the weights of one task a call",
}


def entry(name: str, workload: MLP) -> Rival:
    """What runs under that name on that workload; its build may raise Unavailable."""
    if not isinstance(workload, BankWorkload):
        return RIVALS[name]
    if name in BANK_RIVALS:
        return BANK_RIVALS[name]

    def build(problem: object, mode: str) -> Call:
        raise Unavailable(NO_BANK[name])

    return Rival(name, NO_BANK[name], build)
