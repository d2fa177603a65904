"""The races on a GPU, without one: what races, what the rows say, and all of it at tiny sizes."""

import gc
import json
import os
import re
import signal
import time
import weakref
from collections import Counter
from contextlib import nullcontext
from unittest import mock

import pytest
import torch

from bench.gpu import __main__ as command
from bench.gpu import contest, device, exact, rivals, verdict, workloads
from bench.gpu.workloads import FEW, LAYERS, PATTERNS, PatternBank, banks, jobs, tiny
from bench.rivals import OURS
from bench.workloads import MODES, BankWorkload


@pytest.fixture
def on_the_cpu(monkeypatch):
    for module in (contest, rivals, device, exact):
        monkeypatch.setattr(module, "DEVICE", "cpu")
    for module in (rivals, device):
        monkeypatch.setattr(module, "REHEARSAL", True)
    monkeypatch.setattr(device, "ROUNDS", 1)
    monkeypatch.setattr(device, "TURN", 0)


LIMITS = {"bf16": 1e12, "high": 1e12, "fp32": 1e12, "fp64": 1e12, "copy": 1e11, "cache": 1e11}


def test_the_most_telling_races_come_first_and_none_twice():
    found = jobs()
    assert [j.workload.name for j in found[:2]] == ["few128"] * 2
    assert len(set(found)) == len(found)
    kinds = Counter(j.kind for j in found if isinstance(j.workload, PatternBank))
    assert kinds == {"bf16": 16, "fp32": 16}
    names = {(j.workload.name, j.mode, j.kind) for j in found}
    for n in (2, 4, 8, 16, 64, 256):
        assert {(f"few128_n{n}", m, k) for m in MODES for k in ("bf16", "fp32")} <= names


def test_bars():
    bars = {(j.workload.name, j.mode): j.bar for j in jobs()}
    assert bars["few128", "forward"] == bars["few128_n4", "forward"] == 3
    assert bars["few128", "forward+backward"] == 2
    assert bars["few128_n8", "forward"] == bars["bank100000_r64_skewed", "forward"] == 0.95
    assert bars["layer128", "forward"] == 3


@pytest.mark.parametrize("pattern", PATTERNS)
def test_who_asks(pattern, on_the_cpu):
    bank = BankWorkload("", tasks=1000, rows=900, sizes=(64, 64, 10), requests=3)
    ids = contest.asked(PatternBank(bank, pattern))
    assert ids.shape == (3, 900)
    assert 0 <= ids.min() <= ids.max() < 1000
    most = [Counter(row.tolist()).most_common(1)[0][1] / 900 for row in ids]
    tasks = [len(row.unique()) for row in ids]
    if pattern == "distinct":
        assert tasks == [900] * 3
    elif pattern == "identical":
        assert tasks == [1] * 3
    elif pattern == "skewed":  # of 1000 tasks the first has 1 / sum n^-1.5 = 0.392 of all
        assert most == pytest.approx([0.392] * 3, abs=0.06)
    else:
        assert all(500 < n < 650 for n in tasks)  # 1000 (1 - exp(-0.9))


def test_requests_reach_the_memory():
    """All of a race together read more than a last-level cache holds, where rows are not few."""
    for w in banks():
        if w.bank.rows >= 4096:
            assert w.bank.requests * w.bank.rows * 2 * w.bank.P >= workloads.CACHE


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("w", [tiny(FEW), tiny(LAYERS[0]), *map(tiny, banks()[:4])], ids=str)
def test_a_race(w, kind, on_the_cpu, dynamo):
    """Everybody who is there runs, and is right."""
    found = contest.hold(workloads.Job(w, MODES[0], kind, 2 * (kind == "fp32")), LIMITS)
    by_rival = {row["rival"]: row for row in found}
    for name, row in by_rival.items():
        if "absent" in row or name == "jax":
            continue
        assert "failed" not in row, row["failed"]
        assert row["seconds"] > 0
        assert not verdict.wrong(row), row["error"]
    assert OURS in by_rival
    if isinstance(w, PatternBank):
        assert ("seconds" in by_rival["grouped_mm"]) == (kind == "bf16")
    assert by_rival["bmm"]["bar"] == by_rival[OURS]["bar"]


def test_grouped_products_of_too_many_tasks(on_the_cpu):
    many = PatternBank(BankWorkload("", 1024, 5, (8, 16, 3), requests=1), "uniform")
    with pytest.raises(rivals.Unavailable, match="1023 groups"):
        rivals.BANKS["grouped_mm"](contest.problem_of(many, torch.bfloat16), MODES[0])


def test_what_a_graph_reads_lives_as_long(monkeypatch):
    """A device of no graphs stands in for one: who is captured is called, and then held."""
    for name in ("Stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())
    monkeypatch.setattr(rivals, "REHEARSAL", False)
    made = []

    def build(problem, mode):
        weights = torch.ones(3)
        made.append(weakref.ref(weights))
        return lambda: (weights.sum(),)

    replay = rivals.graphed(build)(None, MODES[0])
    gc.collect()
    assert made[0]() is not None
    assert replay()[0] == 3
    del replay
    gc.collect()
    assert made[0]() is None


# Exactness


@pytest.mark.parametrize("op", exact.OPS)
def test_integers_are_exact(op, on_the_cpu):
    for kind, ragged in (("fp32", True), ("bf16", False)):
        shape = exact.Shape(op, kind, 5, 3, 16, 8, 12, ragged)
        assert exact.wrong(shape, 2) is None


def test_one_wrong_number_in_one_run_is_told(on_the_cpu, monkeypatch):
    shape = exact.shapes(1)[0]._replace(kind="fp32", tasks=3, ins=4, outs=4, features=4)
    call, want = exact.case(shape)
    runs = []

    def flaky():
        runs.append(call())
        y = runs[-1].clone()
        y.view(-1)[0] += 3 * (len(runs) == 4)
        return y

    monkeypatch.setattr(exact, "case", lambda shape: (flaky, want))
    assert exact.wrong(shape, 5) == {"shape": shape, "times": 1, "worst": 3.0}


def test_the_assembler_is_that_of_the_device(on_the_cpu, monkeypatch, tmp_path):
    file = tmp_path / "exact.json"
    monkeypatch.setattr(exact, "facts", lambda: {"ptxas": "13.4, of sm_100"})
    monkeypatch.setattr(exact, "SHAPES", 1)
    monkeypatch.setattr(exact.hyperfast, "use_backend", lambda name: nullcontext())
    monkeypatch.setattr("sys.argv", ["exact", "--out", str(file)])
    exact.main()
    assert json.loads(file.read_text())["ptxas"] == "13.4, of sm_100"


def test_shapes_are_of_every_op_and_kind():
    found = exact.shapes(100)
    assert {s.op for s in found} == set(exact.OPS)
    assert any(s.rows * s.tasks > 4 * 1024 for s in found if s.op == "task_linear_grad_weight")
    kinds = {s.kind for s in found}
    assert kinds == {"bf16", "high", "fp32"}
    many = {(s.op, s.kind) for s in found if s.rows in exact.MANY and s.ragged}
    assert many == {(op, kind) for op in exact.OPS if op.startswith("task") for kind in kinds}
    assert found == exact.shapes(100)
    assert any(s.ins >= 64 and s.outs >= 64 and s.tasks * s.rows >= 128 for s in found)


# What the rows say


def row(workload, rival, seconds, *, mode="forward", bar=3.0, error=1e-7, **more):
    facts = {"workload": workload, "mode": mode, "kind": "bf16", "rival": rival, "bar": bar}
    facts |= {"seconds": seconds, "error": error, "error_of_plain": 1e-7}
    return facts | {"flops_share": 0.4, "bytes_share": 0.5} | more


ROWS = [
    row("few", OURS, 1.0),
    row("few", "hyperfast graph", 0.9),
    row("few", "bmm", 4.0),
    row("few", "bmm compiled", 2.0),
    row("few", "bmm graph", 3.6),
    row("few", "vmap", 0.1, error=0.5),  # fast, and wrong
    row("bank9_distinct", OURS, 1.0, bar=0.95),
    row("bank9_distinct", "hyperfast graph", 1.0, bar=0.95),
    row("bank9_distinct", "bmm", 0.5, bar=0.95),
    row("bank9_distinct", "bmm graph", 2.0, bar=0.95),
]


def test_gaps_are_to_the_best_right_rival_of_ones_own_kind():
    found = [(g.race[0], g.rival, g.reached, g.bar) for g in verdict.gaps(ROWS)]
    assert found == [
        ("bank9_distinct", OURS, 0.5, 0.95),  # 1.9 times as good it must become
        ("bank9_distinct", "hyperfast graph", 0.5, 0.8),  # of a copy: 1.6
        ("few", OURS, 2.0, 3.0),  # 1.5; the graph, at 4, is above its bar
    ]


def test_the_summary_names_what_to_mend_first():
    result = {
        "rows": ROWS,
        "exact": [{"ptxas": "12.8, x", "shapes": 9, "repeats": 20, "wrong": ["S"], "failed": []}],
        "failed": ["networks: broke"],
        "left_out": ["a", "b"],
        "device": "A GPU",
        "ceilings": {"copy": 3e12, "cache": 6e12, "bf16": 8e14},
        "launch_seconds": {"hyper_linear": 2e-5},
        "sort_seconds": 5e-5,
        "plans": [{"kind": "bf16", "flops_per_s": 3e14}],
    }
    text = verdict.summary(result)
    first = text.split("below the bar, the furthest first:\n")[1].splitlines()[0]
    assert first.split()[:3] == ["bank9_distinct", "forward", "bf16"]
    for told in (
        "ptxas 12.8, x: 9 shapes, 20 times each: 1 wrong, 0 failed",
        "wrong: few forward bf16 vmap: 0.5",
        "failed: networks: broke",
        '"A GPU": Machine(3e+12, 2e-05)',
        "GPU_CACHE = 6e+12",
        "GPU_SORT = 5e-05",
        '"half": Gpu(3e+14, 8e+14)',
        "left out for lack of time: 2, the first a",
    ):
        assert told in text
    table = next(line for line in text.splitlines() if line.startswith("few "))
    assert table.split()[1:6] == ["1e+03", "ms", "40%", "50%", "3.0x"]
    assert "wrong" in table


def test_nothing_below_its_bar():
    text = verdict.summary({"rows": ROWS[:1], "failed": [], "left_out": []})
    assert "nothing is below its bar" in text


# The run


def test_what_does_not_fit_its_time_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "REHEARSAL", True)
    monkeypatch.setattr(command.device, "facts", lambda: {"device": "none", "ptxas": ""})
    begin = time.perf_counter()
    monkeypatch.setattr(time, "perf_counter", lambda: begin)
    whole = command.Run(tmp_path / "gpu.json")
    whole.step("fits", "fits", lambda: 3, 15)
    whole.step("breaks", "breaks", lambda: 1 / 0)
    monkeypatch.setattr(time, "perf_counter", lambda: begin + command.ALL - 14)
    whole.step("too long", "long", lambda: 4, 15)
    whole.step("short", "short", lambda: 5, 10)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert (found["fits"], found["short"]) == (3, 5)
    assert found["left_out"] == ["too long"]
    assert found["failed"] == ["breaks: ZeroDivisionError: division by zero"]
    assert "long" not in found


def test_both_assemblers_are_tested_once_each(monkeypatch):
    ran = []

    def run(command, seconds, environment):
        ran.append((environment.get("TRITON_PTXAS_PATH"), environment["TRITON_CACHE_DIR"]))
        return 1

    monkeypatch.setattr(command, "run", run)
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/x/ptxas")
    found = command.exactness()
    assert [path for path, _ in ran] == [None, "/x/ptxas"]
    assert ran[0][1] != ran[1][1]  # or one would be served what the other has assembled
    assert [t["failed"] for t in found] == [["the process ended with 1"]] * 2
    monkeypatch.delenv("TRITON_PTXAS_PATH")
    assert len(command.exactness()) == 1


def test_the_parts_end_within_eight_minutes():
    """What is begun ends: the longest step fits between its start, at the latest, and the end."""
    script = (command.machine.ROOT / "bench/gpu/gpu.sh").read_text()
    end, grace = re.search(r"timeout -k (\d+) (\d+)", script).group(2, 1)
    assert int(end) + int(grace) <= 480
    assert int(end) > command.ALL


def test_what_runs_when_the_time_is_over_is_broken_off(tmp_path, monkeypatch):
    """And the rest is summed up."""
    monkeypatch.setattr(command, "REHEARSAL", True)
    monkeypatch.setattr(command.device, "facts", lambda: {"device": "none", "ptxas": ""})
    before = signal.signal(signal.SIGTERM, command.out_of_time)
    try:
        whole = command.Run(tmp_path / "gpu.json")
        whole.step("slow", "slow", lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(30)))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert whole.result["failed"] == ["slow: OutOfTime: the time is over"]


def test_a_race_is_broken_off(on_the_cpu, monkeypatch):
    """As a whole, not the rival alone whose turn it is."""
    ran = []

    def slow(problem, mode):
        ran.append("slow")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    field = {"slow": slow, "later": lambda problem, mode: ran.append("later")}
    monkeypatch.setattr(contest, "field", lambda workload, thorough: field)
    before = signal.signal(signal.SIGTERM, command.out_of_time)
    try:
        with pytest.raises(command.OutOfTime):
            contest.hold(workloads.Job(tiny(LAYERS[0]), MODES[0], "fp32", 0), LIMITS)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ran == ["slow"]


@pytest.mark.parametrize(
    ("rehearsal", "status", "bad"),
    [(False, 0, False), (False, 5, True), (True, 5, False), (True, 1, True)],
)
def test_on_a_gpu_its_tests_must_have_run(rehearsal, status, bad, monkeypatch):
    """5 is pytest's status where none ran."""
    monkeypatch.setattr(command, "REHEARSAL", rehearsal)
    assert command.failed({"rows": [], "failed": [], "tests_exit": status}) == bad
