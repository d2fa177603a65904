"""The benchmark's own arithmetic, and that its rivals do the work they are timed for."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import run
from bench.measure import calibrate, ceilings, memory, race
from bench.measure.contest import as_tensors, hold
from bench.measure.load import ForeignLoad
from bench.problem import CORNER, Judge, _corner_distance, answer, make_problem
from bench.rivals import OURS, RIVALS, entry
from bench.rivals.plain import bmm
from bench.rivals.rival import Rival, Unavailable, on_one_thread, torch_rival
from bench.show import plots
from bench.show import results_file as results
from bench.show import tables as report
from bench.workloads import MODES, WORKLOADS, BankWorkload, Workload
from hyperfast.plans import choose as plan
from hyperfast.plans.choose import PLANS

ROOT = Path(__file__).resolve().parents[2]
TINY = Workload("tiny", B=3, N=5, z_dim=4, H=6, sizes=(3, 7, 2))
TINY_SINE = Workload("tiny_sine", B=2, N=3, z_dim=4, H=5, sizes=(2, 4, 3, 1), activation="sin")
TINY_SINGLE = Workload("tiny_single", B=1, N=1, z_dim=4, H=6, sizes=(3, 7, 2))
TINY_BANK = BankWorkload("tiny_bank", tasks=11, rows=63, sizes=(3, 7, 2), requests=2)
EAGER = [name for name in RIVALS if "compiled" not in name]


# workloads ---------------------------------------------------------------------------------------


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
    assert table["qmix1024"] == (1024, 1, 120, 64, (8, 32, 1), "relu")
    assert table["qmix4096"] == (4096, 1, 120, 64, (8, 32, 1), "relu")
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


# right answers -----------------------------------------------------------------------------------


def test_no_pre_activation_on_the_corner():
    for workload in (TINY, WORKLOADS["qmix1024"]):
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
    rest = {"hyperfast compiled", "vmap", "bmm by layer compiled"}
    assert set(absent["tiny_bank"]) - packages == rest
    assert set(absent["tiny"]) - packages == {"hyperfast bf16", "hyperfast TaskBank"}
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


# the race ----------------------------------------------------------------------------------------


class FakeClock:
    now = 0.0

    def __call__(self) -> float:
        return self.now

    def call(self, seconds: float, log: list[str], name: str):
        def run() -> None:
            log.append(name)
            self.now += seconds

        return run


def test_race_takes_turns_and_counts_each_call():
    clock, log = FakeClock(), []
    calls = {"slow": clock.call(1.0, log, "slow"), "fast": clock.call(0.01, log, "fast")}
    samples = race.race(calls, rounds=4, clock=clock)
    assert [len(turn) for turn in samples["slow"]] == [1] * 4
    assert all(2 <= len(turn) <= race.MOST_CALLS for turn in samples["fast"])
    assert race.flat(samples["slow"]) == pytest.approx([1.0] * 4)
    turns = [name for name, _ in itertools.groupby(log)]
    assert turns.count("slow") >= 2  # interleaved, not one after the other
    assert len(log) == 8 + sum(len(t) for t in samples["fast"]) + 4  # one untimed call a turn


def test_drift_cancels_in_the_ratio():
    ours = [[1.0, 1.0], [3.0, 3.0], [9.0, 9.0]]  # the machine slows down threefold, twice
    rival = [[2.0], [6.0], [18.0]]
    assert race.ratio(rival, ours) == pytest.approx((2.0, 2.0, 2.0))


def test_foreign_load_is_a_share():
    with ForeignLoad() as load:
        sum(range(10**6))
    assert load.share is None or load.share >= 0


def test_contest_tells_absence_and_failure_apart():
    def missing(problem):
        raise Unavailable("no such package")

    def broken(problem):
        raise RuntimeError("broke")

    def wrong(problem):
        function, leaves = bmm(problem)
        return (lambda z, x: function(z, x) * 1.001), leaves

    rivals = [
        torch_rival(OURS, "", bmm),
        torch_rival("missing", "", missing),
        torch_rival("broken", "", broken),
        torch_rival("wrong", "", wrong),
    ]
    outcomes = hold(TINY, "forward", rivals, rounds=2)
    assert outcomes[OURS].share <= 1
    assert outcomes[OURS].ratio[0] == 1
    assert outcomes["missing"].absent == "no such package"
    assert isinstance(outcomes["broken"].failure, RuntimeError)
    assert outcomes["wrong"].share > 1


@pytest.mark.skipif(memory.unavailable() is not None, reason=str(memory.unavailable()))
def test_peak_memory_of_a_known_allocation():
    script = (
        "import torch; from bench.measure.memory import peak_extra\n"
        "def call():\n"
        "    temporary = torch.ones(8 * 2**20 // 4)\n"
        "    return (temporary[: 2 * 2**20 // 4] + 1,)\n"
        "call(); print(peak_extra(call))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, **memory.ENVIRONMENT},
        capture_output=True,
        text=True,
        check=True,
    )
    # 8 MiB of temporary; the 2 MiB that are returned do not count
    assert int(done.stdout) / 2**20 == pytest.approx(8, abs=0.5)


# results -----------------------------------------------------------------------------------------


def made_up(workload: str = "qmix1024", date: str = "2026-01-01", **ratios: float):
    """Results of one workload with these rivals' ratios, in the form in which files hold them."""
    benchmarks = [
        {
            "stats": {"median": 1e-3 * ratio, "iqr": 1e-5, "rounds": 7},
            "extra_info": {
                "workload": workload,
                "mode": "forward",
                "rival": rival,
                "ratio": [ratio, ratio, ratio],
                "peak_extra_bytes": 2**20,
                "error_share_of_budget": 0.1,
                "foreign_load": 0.5,
                "flops": 10**6,
                "bytes": 10**5,
            },
        }
        for rival, ratio in {"jax": 1.0, OURS: 1.0, **ratios}.items()
    ]
    return results.collect(
        {
            "benchmarks": benchmarks,
            "hyperfast": {
                "date": date,
                "commit": "0" * 40,
                "threads": 2,
                "scale": 1,
                "rounds": 7,
                "machine": {"cpu": "a cpu", "cores": 2, "isa": ["avx2"], "system": "Linux"},
                "versions": {"torch": "2.13.0"},
                "ceilings": {"gflops": 400.0, "read_gbytes": 40.0},
                "memory": "",
                "absent": [
                    {"workload": workload, "mode": "forward", "rival": "hyperlight",
                     "reason": "hyperlight cannot be imported"}
                ],
            },
        }
    )  # fmt: skip


def test_results_survive_the_file_in_stable_order(tmp_path):
    found = made_up(bmm=2.0)
    results.write(found, tmp_path / "a" / "r.json")
    assert results.read(tmp_path / "a" / "r.json") == found
    assert [row["rival"] for row in found["results"]] == [OURS, "bmm", "jax"]
    assert results.ratios(found) == {
        ("qmix1024", "forward", "bmm"): 2.0,
        ("qmix1024", "forward", "jax"): 1.0,
    }


def test_a_partial_run_replaces_its_workloads_alone(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "r.json"
    run.save(made_up("qmix1024", bmm=2.0, loop=9.0), path, keep=True)
    run.save(made_up("mlp64_n1", bmm=3.0), path, keep=True)
    run.save(made_up("qmix1024", date="2026-02-02", bmm=4.0), path, keep=True)
    found = results.read(path)
    assert list(found["workloads"]) == ["qmix1024", "mlp64_n1"]
    assert results.ratios(found) == {
        ("qmix1024", "forward", "bmm"): 4.0,
        ("qmix1024", "forward", "jax"): 1.0,
        ("mlp64_n1", "forward", "bmm"): 3.0,
        ("mlp64_n1", "forward", "jax"): 1.0,
    }
    dates = {name: fact["measured"]["date"] for name, fact in found["workloads"].items()}
    assert dates == {"qmix1024": "2026-02-02", "mlp64_n1": "2026-01-01"}
    assert [row["workload"] for row in found["absent"]] == ["qmix1024", "mlp64_n1"]


def test_results_of_another_machine_are_not_mixed():
    old, new = made_up("qmix1024"), made_up("mlp64_n1")
    old["machine"] = {**old["machine"], "cpu": "another"}
    assert results.merge(old, new) == new


def test_ceilings_stay_at_the_highest_seen():
    old, new = made_up(), made_up()
    old["ceilings"] = {"gflops": 500.0, "read_gbytes": 30.0}
    assert results.merge(old, new)["ceilings"] == {"gflops": 500.0, "read_gbytes": 40.0}


def test_ceilings_are_above_a_plain_product_and_sum(monkeypatch):
    monkeypatch.setattr(ceilings, "SECONDS", 0.02)
    monkeypatch.setattr(ceilings, "READ", 1 << 22)
    found = ceilings.measure(1)
    assert found["gflops"] > 1
    assert found["read_gbytes"] > 0.1
    assert ceilings.best(lambda: time.sleep(0.005), 1.0) < 200


@pytest.mark.parametrize(("now", "status"), [(2.0, 0), (1.71, 0), (1.69, 3), (1.0, 3), (4.0, 0)])
def test_compare_fails_only_when_a_ratio_fell(tmp_path, capsys, now, status):
    results.write(made_up(bmm=2.0, jax=4.0, vmap=3.0), tmp_path / "old.json")
    new = made_up(bmm=now, jax=2 * now, vmap=30.0)  # one rival is noisy
    results.write(new, tmp_path / "new.json")
    files = {"report": tmp_path / "new.json", "compare": tmp_path / "old.json"}
    argv = [f"--{option}={file}" for option, file in files.items()]
    assert run.main([*argv, "--tolerance=0.15"]) == status
    assert ("slower: qmix1024 forward: ratios to rivals are" in capsys.readouterr().out) == (
        status == 3
    )


def test_comparing_nothing_does_not_pass():
    other = made_up()
    other["results"] = []
    with pytest.raises(ValueError, match="in common"):
        list(results.regressions(made_up(), other, 0.15))


@pytest.mark.parametrize("markdown", [False, True])
def test_report_shows_ratios_absence_and_load(markdown):
    text = report.text(made_up(bmm=2.5), markdown)
    assert "2.50x" in text
    assert "hyperlight cannot be imported" in text
    assert "qmix1024 forward (50%)" in text
    assert ("| qmix1024" in text) == markdown


def test_over_the_floor_is_against_the_nearer_ceiling():
    ceilings = {"gflops": 400.0, "read_gbytes": 40.0}
    assert report.over_floor({"gflops": 100.0, "gbytes": 1.0}, ceilings) == 4
    assert report.over_floor({"gflops": 1.0, "gbytes": 20.0}, ceilings) == 2


@pytest.mark.parametrize("draw", [plots.speed, plots.roofline])
def test_plots_are_reproducible(tmp_path, draw):
    pytest.importorskip("matplotlib")
    for name in ("a.svg", "b.svg", "c.svg"):
        draw(made_up(jax=2.5 if name != "c.svg" else 5.0), tmp_path / name)
    a, b, c = ((tmp_path / f"{name}.svg").read_bytes() for name in "abc")
    assert len(a) > 5000
    assert a == b
    assert a != c


def test_a_family_is_drawn_by_its_fastest_member():
    by_rival = {row["rival"]: row for row in made_up(hypnettorch=3.0, hyperlight=2.0)["results"]}
    assert plots.fastest(by_rival, ("hypnettorch", "hyperlight", "hyper-nn"))["ratio"] == 2.0
    assert plots.fastest(by_rival, ("hyper-nn",)) is None


@pytest.mark.parametrize("argv", [["--only", "nope"], ["--rivals", "bmm,nope"]])
def test_unknown_names_are_told(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        run.main(argv)
    assert exit.value.code == 2
    assert "unknown: nope; there are:" in capsys.readouterr().err


def test_registry_has_unique_described_entries():
    assert OURS in RIVALS
    assert all(isinstance(r, Rival) and r.about for r in RIVALS.values())


# calibration -------------------------------------------------------------------------------------

CALIBRATION = results.read(calibrate.FILE)["results"]


@pytest.mark.parametrize("device", ["cpu", "cpp"])
def test_the_chosen_plan_is_near_the_fastest_of_the_calibration(device):
    """At most 15% slower, in every case that was measured; the whole bench table is among them."""
    rows = [row for row in CALIBRATION if row["device"] == device]
    assert {tuple(layer[:5]) for layer in calibrate.grid()} == {tuple(r["layer"]) for r in rows}
    for row in rows:
        seconds = row["seconds"]
        assert len(seconds) >= 2
        chosen = plan.choose(plan.Layer(*row["layer"]), 4, device)
        assert seconds.get(chosen, math.inf) <= 1.15 * min(seconds.values()), (row, chosen)


def test_the_table_is_in_the_grid():
    layers = [(l.tasks, l.rows, l.in_features, l.out_features) for l in calibrate.grid()]
    for w in WORKLOADS.values():
        if isinstance(w, Workload):
            assert {(w.B, w.B * w.N, i, o) for i, o in w.layers} <= set(layers)


def test_every_plan_that_is_not_hopeless_is_timed():
    rows = calibrate.time_all([plan.Layer(2, 2, 3, 4, 5), plan.Layer(2, 200, 3, 4, 50)], "cpu")
    assert [row["layer"] for row in rows] == [(2, 2, 3, 4, 5), (2, 200, 3, 4, 50)]
    assert [set(row["seconds"]) for row in rows] == [set(PLANS), {"tile", "materialize"}]
    assert all(t > 0 for row in rows for t in row["seconds"].values())


def test_a_fit_finds_the_plans_of_a_machine_that_is_as_modelled():
    """Made-up rates, far from where the fit begins, under which each plan wins somewhere."""
    rates = {
        "contract": plan.Work(calls=3e-6, products=2e-5, generated=8e-12),
        "tile": plan.Work(calls=1e-5, head=5e-10, generated=4e-12),
        "materialize": plan.Work(calls=2e-5, head=2e-11, generated=4e-12, stored=5e-10),
    }
    rows = []
    for layer in calibrate.grid()[::4]:
        work = plan.work(layer, 4, "cpu")
        seconds = {name: work[name].seconds(rates[name]) for name in rates}
        least = min(seconds.values())
        seconds = {n: s for n, s in seconds.items() if s < calibrate.HOPELESS * least}
        rows.append({"device": "cpu", "layer": layer[:5], "seconds": seconds})
    assert {min(row["seconds"], key=row["seconds"].get) for row in rows} == set(rates)
    fitted = calibrate.fit(rows, "cpu", steps=600)
    assert max(calibrate.regret(row, fitted)[0] for row in rows) < 1.05


def test_the_report_tells_what_a_wrong_rate_costs(monkeypatch):
    row = {
        "device": "cpu",
        "layer": [1, 1, 2, 3, 4],
        "seconds": {"tile": 4e-6, "materialize": 1e-6},
    }
    monkeypatch.setattr(calibrate, "fit", lambda rows, device: {
        "tile": plan.Work(calls=1), "materialize": plan.Work(calls=2)
    })  # fmt: skip
    text = calibrate.report([row])
    assert "cpu, fitted: regret 4.00 at worst, 4.000 in the mean, above 1.15 in 1 of 1" in text
    assert '"tile": Work(1, 0, 0, 0, 0, 0, 0, 0)' in text
