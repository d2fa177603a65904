"""The rivals do the work that they are timed for, and a wrong answer is found."""

from __future__ import annotations

import math

import pytest
import torch

from bench.absent import Unavailable
from bench.measure.contest import as_tensors
from bench.problem import CORNER, Judge, _corner_distance, answer, make_problem
from bench.rivals import OURS, RIVALS, entry
from bench.rivals.rival import Rival, on_one_thread
from bench.workloads import WORKLOADS
from tests.support.workloads import TINY, TINY_BANK, TINY_SINE, TINY_SINGLE

EAGER = [name for name in RIVALS if "compiled" not in name]


def test_no_pre_activation_on_the_corner():
    for workload in (TINY, WORKLOADS["mlp8_1024"]):
        trunk, rows = _corner_distance(make_problem(workload).to(torch.float64))
        assert trunk.min() >= CORNER
        assert rows.min() >= CORNER


ALL_TINY = [(w, mode) for w in (TINY, TINY_SINE, TINY_SINGLE, TINY_BANK) for mode in w.modes]


@pytest.mark.parametrize(
    ("workload", "mode"), ALL_TINY, ids=lambda value: getattr(value, "name", value)
)
@pytest.mark.parametrize("name", EAGER)
@pytest.mark.filterwarnings("ignore")  # rivals' deprecations are theirs
def test_rival_equals_reference(name, mode, workload):
    rival = entry(name, workload)
    problem = make_problem(workload).to(rival.dtype)
    try:
        call = rival.build(problem, mode)
    except Unavailable as reason:
        pytest.skip(str(reason))
    outputs = as_tensors(call())
    assert len(outputs) == (1 if mode == "forward" else 6)
    assert Judge(problem, mode).share(outputs) <= 1


def test_what_cannot_take_part_says_why():
    """Where an entry other than an optional package is absent, that is known in advance."""
    absent: dict[str, dict[str, str]] = {}
    for workload, mode in ALL_TINY:
        for name in RIVALS:
            rival = entry(name, workload)
            try:
                rival.build(make_problem(workload).to(rival.dtype), mode)
            except Unavailable as reason:
                absent.setdefault(workload.name, {})[name] = str(reason)
    packages = {"hypnettorch", "hyperlight", "hyper-nn", "jax"}
    bf16 = {"bmm bf16", "bmm by layer compiled bf16"}
    rest = {"hyperfast compiled", "vmap", "bmm by layer compiled"}
    assert set(absent["tiny_bank"]) - packages == rest | bf16
    assert set(absent["tiny"]) - packages == {"hyperfast bf16", "hyperfast TaskBank"} | bf16
    assert all(len(why) > 20 for by_name in absent.values() for why in by_name.values())


@pytest.mark.parametrize("output", range(6))
def test_judge_rejects_an_error_in_any_output(output):
    problem = make_problem(TINY)
    judge = Judge(problem, "forward+backward")
    outputs = list(answer(problem, "forward+backward"))
    assert judge.share(tuple(outputs)) <= 1
    outputs[output] = outputs[output].bfloat16().float()
    assert judge.share(tuple(outputs)) > 10


def test_one_thread_is_one_thread_for_that_call_alone():
    threads = []

    def build(problem, mode):
        return lambda: (threads.append(torch.get_num_threads()),)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        on_one_thread(Rival("a", "", build)).build(None, "forward")()
        assert threads == [1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_judge_rejects_nan_wrong_shapes_and_missing_outputs():
    problem = make_problem(TINY)
    judge = Judge(problem, "forward")
    (y,) = answer(problem, "forward")
    assert judge.share((y.mT,)) == math.inf
    assert judge.share((y * math.nan,)) == math.inf
    assert judge.share(()) == math.inf


def test_registry_has_unique_described_entries():
    assert OURS in RIVALS
    assert all(isinstance(r, Rival) and r.about for r in RIVALS.values())
