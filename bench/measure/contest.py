"""One workload in one mode: every rival built, warmed, timed in turns and judged."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.absent import Unavailable
from bench.measure.load import ForeignLoad
from bench.measure.race import Rounds, flat, race, ratio, warm_up
from bench.problem import AnyWorkload, Judge, make_problem
from bench.real.real import Step
from bench.rivals import OURS
from bench.rivals.rival import Call, Rival


@dataclass(frozen=True)
class Outcome:
    """What one rival achieved; `absent`: why it could not take part, `failure`: what it raised."""

    samples: tuple[float, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    share: float | None = None  # error as a share of the budget
    ratio: tuple[float, float, float] | None = None  # to ours: of medians, quartiles over rounds
    foreign_load: float | None = None  # share of the machine that others took during the race
    absent: str | None = None
    failure: Exception | None = None


def as_tensors(outputs: Iterable[Any]) -> tuple[Tensor, ...]:
    """torch or JAX on the CPU -> torch."""
    return tuple(
        out if isinstance(out, Tensor) else torch.from_numpy(np.array(out)) for out in outputs
    )


def hold(
    workload: AnyWorkload, mode: str, rivals: Iterable[Rival], rounds: int
) -> dict[str, Outcome]:
    # Compiled rivals of several workloads share code objects: forget the earlier shapes, lest
    # a recompilation limit or dynamic shapes come into play.
    torch._dynamo.reset()
    problem = make_problem(workload)
    problems = {problem.dtype: problem}
    judges: dict[torch.dtype, Judge] = {}
    calls: dict[str, Call] = {}
    outcomes: dict[str, Outcome] = {}
    dtypes: dict[str, torch.dtype] = {}
    for rival in rivals:
        try:
            if rival.dtype not in problems:
                problems[rival.dtype] = problem.to(rival.dtype)
            call = rival.build(problems[rival.dtype], mode)
            warm_up(call)
        except Unavailable as reason:
            outcomes[rival.name] = Outcome(absent=str(reason))
        except Exception as error:  # told by this rival's test; the others still race
            outcomes[rival.name] = Outcome(failure=error)
        else:
            calls[rival.name], dtypes[rival.name] = call, rival.dtype

    with ForeignLoad() as load:
        times: dict[str, Rounds] = race(calls, rounds)
    for name, call in calls.items():
        results = call()
        outputs = as_tensors(call.outputs(results) if isinstance(call, Step) else results)
        dtype = dtypes[name]
        if dtype not in judges:
            judges[dtype] = Judge(problems[dtype], mode)
        outcomes[name] = Outcome(
            samples=tuple(seconds / workload.requests for seconds in flat(times[name])),
            outputs=outputs,
            share=judges[dtype].share(outputs),
            ratio=ratio(times[name], times[OURS]) if OURS in times else None,
            foreign_load=load.share,
        )
    return outcomes
