"""Results: their file, its comparison, tables and plots; and the command that makes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import run
from bench.rivals import OURS
from bench.show import page, plots, results_file, tables
from bench.workloads import MODES, WORKLOADS


def made_up(workload: str = "mlp8_1024", date: str = "2026-01-01", **ratios: float):
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
    return results_file.collect(
        {
            "benchmarks": benchmarks,
            "hyperfast": {
                "date": date,
                "commit": "0" * 40,
                "threads": 2,
                "scale": 1,
                "small": False,
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
    results_file.write(found, tmp_path / "a" / "r.json")
    assert results_file.read(tmp_path / "a" / "r.json") == found
    assert [row["rival"] for row in found["results"]] == [OURS, "bmm", "jax"]
    assert results_file.ratios(found) == {
        ("mlp8_1024", "forward", "bmm"): 2.0,
        ("mlp8_1024", "forward", "jax"): 1.0,
    }


def test_a_partial_run_replaces_its_workloads_alone(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "r.json"
    run.save(made_up("mlp8_1024", bmm=2.0, loop=9.0), path, keep=True)
    run.save(made_up("mlp64_n1", bmm=3.0), path, keep=True)
    run.save(made_up("mlp8_1024", date="2026-02-02", bmm=4.0), path, keep=True)
    found = results_file.read(path)
    assert list(found["workloads"]) == ["mlp8_1024", "mlp64_n1"]
    assert results_file.ratios(found) == {
        ("mlp8_1024", "forward", "bmm"): 4.0,
        ("mlp8_1024", "forward", "jax"): 1.0,
        ("mlp64_n1", "forward", "bmm"): 3.0,
        ("mlp64_n1", "forward", "jax"): 1.0,
    }
    dates = {name: fact["measured"]["date"] for name, fact in found["workloads"].items()}
    assert dates == {"mlp8_1024": "2026-02-02", "mlp64_n1": "2026-01-01"}
    assert [row["workload"] for row in found["absent"]] == ["mlp8_1024", "mlp64_n1"]


def test_results_of_another_machine_are_not_mixed():
    old, new = made_up("mlp8_1024"), made_up("mlp64_n1")
    old["machine"] = {**old["machine"], "cpu": "another"}
    assert results_file.merge(old, new) == new


def test_ceilings_stay_at_the_highest_seen():
    old, new = made_up(), made_up()
    old["ceilings"] = {"gflops": 500.0, "read_gbytes": 30.0}
    assert results_file.merge(old, new)["ceilings"] == {"gflops": 500.0, "read_gbytes": 40.0}


@pytest.mark.parametrize(("now", "status"), [(2.0, 0), (1.71, 0), (1.69, 3), (1.0, 3), (4.0, 0)])
def test_compare_fails_only_when_a_ratio_fell(tmp_path, capsys, now, status):
    results_file.write(made_up(bmm=2.0, jax=4.0, vmap=3.0), tmp_path / "old.json")
    new = made_up(bmm=now, jax=2 * now, vmap=30.0)  # one rival is noisy
    results_file.write(new, tmp_path / "new.json")
    files = {"report": tmp_path / "new.json", "compare": tmp_path / "old.json"}
    argv = [f"--{option}={file}" for option, file in files.items()]
    assert run.main([*argv, "--tolerance=0.15"]) == status
    assert ("slower: mlp8_1024 forward: ratios to rivals are" in capsys.readouterr().out) == (
        status == 3
    )


def test_comparing_nothing_does_not_pass():
    other = made_up()
    other["results"] = []
    with pytest.raises(ValueError, match="in common"):
        list(results_file.regressions(made_up(), other, 0.15))


@pytest.mark.parametrize("markdown", [False, True])
def test_report_shows_ratios_absence_and_load(markdown):
    text = tables.text(made_up(bmm=2.5), markdown)
    assert "2.50x" in text
    assert "hyperlight cannot be imported" in text
    assert "mlp8_1024 forward (50%)" in text
    assert ("| mlp8_1024" in text) == markdown


def test_a_real_workload_is_told_against_the_faster_of_its_peers():
    found = made_up("agcrn", formula=3.0, **{"formula compiled": 2.0, "shortcut": 0.5})
    table = page.real(found, "forward").splitlines()
    about = "AGCRN's graph convolution, a matrix for every sensor"
    cells = [cell.strip() for cell in table[2].strip("|").split("|")]
    assert cells == [
        *(f"`agcrn`: {about}", "1 ms", "3.0x", "2.0x", "2.0x", "███", "0.50x", "1.0", "1.0")
    ]
    # It stands in tables of its own, and in no picture.
    assert "agcrn" not in page.speeds(found, "forward")
    text = tables.text(found)
    assert "3.00x" in text
    assert "of the textbook way" not in text


def test_tables_hold_the_rivals_of_their_own_workloads():
    both = results_file.merge(made_up("mlp8_1024", bmm=2.0), made_up("agcrn", formula=3.0))
    heads = [line for line in tables.text(both).splitlines() if line.startswith("workload ")]
    assert any("bmm" in line and "formula" not in line for line in heads)
    assert any("formula" in line and "bmm" not in line for line in heads)


def test_over_the_floor_is_against_the_nearer_ceiling():
    ceilings = {"gflops": 400.0, "read_gbytes": 40.0}
    assert tables.over_floor({"gflops": 100.0, "gbytes": 1.0}, ceilings) == 4
    assert tables.over_floor({"gflops": 1.0, "gbytes": 20.0}, ceilings) == 2


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


# What the pages say is what was measured.

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "bench" / "README.md").read_text()
MEASURED = results_file.read(
    ROOT / "bench/results/intel-r-xeon-r-processor-family-6-model-167-amx-bf16-2c-2t.json"
)
REAL = results_file.read(ROOT / "bench/results/amd-epyc-family-25-model-1-avx2-2c-2t.json")


def test_tables_of_the_page_are_made_of_the_results():
    for table in (*(page.speeds(MEASURED, mode) for mode in MODES), page.limits(MEASURED)):
        assert table in PAGE
    assert all(page.real(REAL, mode) in PAGE for mode in MODES)
    ceilings = MEASURED["ceilings"]
    assert f"{ceilings['gflops']:,.0f} GFLOP/s in products of floats" in PAGE
    assert f"reads {ceilings['read_gbytes']:.1f} GB/s" in PAGE


@pytest.mark.parametrize(
    ("workload", "start"),
    [
        ("mlp8_4096", "| mixer-sized: 4,096 tasks, one row each, 8-32-1 |"),
        ("mlp128_n1", "| few rows: 512 tasks, one row each, 128-128-128 |"),
        ("mlp128_n64", "| many rows: 512 tasks, 64 rows each, 128-128-128 |"),
        ("bank20000", "| a bank: 20,000 stored 64-64-10, 4,096 mixed rows |"),
    ],
)
def test_rows_of_the_readme_are_the_best_rivals(workload, start):
    line = next(x for x in (ROOT / "README.md").read_text().splitlines() if x.startswith(start))
    for mode in WORKLOADS[workload].modes:
        by_rival = tables.rows_of(MEASURED, mode)[workload]
        others = [name for _, _, members in plots.FAMILIES.values() for name in members]
        best = plots.fastest(by_rival, others)
        name = "compiled bmm" if "compiled" in best["rival"] else best["rival"]
        assert f"| {tables.duration(by_rival[OURS]['median_s'])} | {name}, " in line
        assert f" {page.times(best['ratio'])}" in line
