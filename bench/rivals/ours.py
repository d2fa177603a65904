"""hyperfast itself, called as a user calls it."""

from __future__ import annotations

from torch import Tensor

from bench.absent import Unavailable
from bench.problem import Problem
from bench.rivals.plain import compiled
from bench.rivals.rival import (
    Call,
    Network,
    Rival,
    in_bf16,
    load_linears,
    on_one_thread,
    torch_rival,
)


def hyper_mlp(problem: Problem) -> Network:
    import hyperfast

    w = problem.workload
    hyper = hyperfast.HyperNet(
        w.z_dim,
        w.sizes[0],
        w.sizes[1:-1],
        w.sizes[-1],
        hidden=(w.H,),
        target_activation=w.activation,
        dtype=problem.z.dtype,
    )
    leaves = load_linears(hyper.generator, problem)
    model = hyperfast.HyperMLP(hyper, hyperfast.TargetNet(w.activation))

    def function(z: Tensor, x: Tensor) -> Tensor:
        return model(x, z)

    return function, leaves


def _no_bank(problem: Problem, mode: str) -> Call:
    raise Unavailable("serves stored weights; here they are generated")


OURS = torch_rival("hyperfast", "HyperMLP, default backend and plan", hyper_mlp)
HYPERFAST = (
    OURS,
    on_one_thread(OURS),
    in_bf16("hyperfast bf16", "the same in bfloat16, forward", hyper_mlp),
    Rival("hyperfast TaskBank", "TaskBank, for given weights", _no_bank),
    torch_rival("hyperfast compiled", "the same under torch.compile", compiled(hyper_mlp)),
)
