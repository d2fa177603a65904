"""Workloads are what their names say, and count their FLOPs and bytes right."""

from __future__ import annotations

import pytest
import torch

from bench.problem import answer, make_problem
from bench.workloads import MODES, WORKLOADS, BankWorkload, Workload
from tests.support.workloads import TINY, TINY_BANK, TINY_SINE


def test_workloads_are_what_their_names_say():
    table = {
        n: (w.B, w.N, w.z_dim, w.H, w.sizes, w.activation)
        for n, w in WORKLOADS.items()
        if isinstance(w, Workload)
    }
    assert table["mlp64_single"] == (1, 1, 32, 64, (64, 64, 10), "relu")
    bank = WORKLOADS["bank20000"]
    assert (bank.tasks, bank.rows, bank.sizes) == (20_000, 4096, (64, 64, 10))
    assert bank.modes == ("forward",)
    assert table["mlp8_1024"] == (1024, 1, 120, 64, (8, 32, 1), "relu")
    assert table["mlp8_4096"] == (4096, 1, 120, 64, (8, 32, 1), "relu")
    assert table["digits_inr"] == (256, 64, 32, 128, (2, 32, 1), "relu")
    assert table["siren"] == (16, 4096, 32, 256, (2, 64, 64, 1), "sin")
    for n, B, N in (("mlp64_n1", 1024, 1), ("mlp64_n32", 256, 32)):
        assert table[n] == (B, N, 32, 64, (64, 64, 10), "relu")
    for n in (1, 8, 64):
        assert table[f"mlp128_n{n}"] == (512, n, 32, 128, (128, 128, 128), "relu")


@pytest.mark.parametrize("workload", [TINY, TINY_SINE], ids=lambda w: w.name)
def test_counts_match_the_problem(workload):
    problem = make_problem(workload)
    assert problem.head_bias.numel() == workload.P
    assert sum(t.numel() for t in problem.parameters) == workload.hyper_params
    elements = sum(t.numel() for t in (*problem.parameters, problem.z, problem.x, problem.grad))
    assert workload.bytes("forward") == 4 * elements  # grad has y's size


@pytest.mark.parametrize("mode", MODES)
def test_flops_match_the_flop_counter(mode):
    from torch.utils.flop_counter import FlopCounterMode

    problem = make_problem(TINY)
    with FlopCounterMode(display=False) as counter:
        answer(problem, mode)
    assert counter.get_total_flops() == TINY.flops(mode)


def test_counts_of_a_bank_match_its_requests():
    problem = make_problem(TINY_BANK)
    touched = [len(ids.unique()) for ids in problem.task_ids]
    assert touched == [TINY_BANK.tasks] * 2  # 63 rows miss one of 11 tasks 2 times in 1,000
    moved = problem.flat.nbytes + problem.x[0].nbytes + problem.task_ids[0].nbytes + 63 * 2 * 4
    assert TINY_BANK.bytes("forward") == moved
    few = BankWorkload("few", tasks=20_000, rows=4096, sizes=(64, 64, 10))
    found = [len(torch.randint(20_000, (4096,)).unique()) for _ in range(20)]
    expected = (few.bytes("forward") - 4096 * (74 * 4 + 8)) / 4 / few.P
    assert expected == pytest.approx(sum(found) / 20, rel=0.01)
    assert few.flops("forward") == 4096 * 2 * (64 * 64 + 64 * 10)


def test_scaling_multiplies_the_tasks_only():
    scaled = TINY.scaled(8)
    assert (scaled.B, scaled.N, scaled.P) == (24, TINY.N, TINY.P)
