"""Who computes a real workload, in the order in which tables show them."""

from __future__ import annotations

import torch

from bench.absent import Unavailable
from bench.real.real import Network, RealProblem, Step
from bench.rivals.rival import Rival

LONG = "a Python loop of that many turns takes minutes to compile"


def rival(name: str, about: str, way: str, compiled: bool = False) -> Rival:
    """`way` names the method of a workload that makes the network."""

    def build(problem: RealProblem, mode: str) -> Step:
        workload = problem.workload
        if compiled and way != "shortcut" and workload.loops:
            raise Unavailable(LONG)
        network: Network = getattr(workload, way)(problem.leaves)
        if compiled:
            function = torch.compile(network.function, dynamic=False)
            network = Network(function, network.parameters, network.back)
        return Step(problem, network, mode)

    return Rival(name, about, build)


REAL_RIVALS = {
    r.name: r
    for r in (
        rival("hyperfast", "modules and functions of hyperfast", "ours"),
        rival("package", "the published package itself", "package"),
        rival("package compiled", "the same under torch.compile", "package", True),
        rival("formula", "as published code computes it", "formula"),
        rival("formula compiled", "the same under torch.compile", "formula", True),
        rival("shortcut", "the fastest way in plain PyTorch that we know", "shortcut"),
        rival("shortcut compiled", "the same under torch.compile", "shortcut", True),
    )
}
