"""Plans are timed, rates are fitted, and the choice that they lead to is near the fastest."""

from __future__ import annotations

import math

import pytest
import torch

from bench import run
from bench.measure import calibrate
from bench.show import calibration, results_file
from bench.workloads import WORKLOADS, Workload
from hyperfast.plans import choose as plan
from hyperfast.plans.cpu import EXTENSION
from hyperfast.plans.sizes import PLANS, Sizes, Work

CALIBRATION = results_file.read(run.CALIBRATION)["results"]


@pytest.mark.parametrize("device", ["cpu", "cpp"])
def test_the_chosen_plan_is_near_the_fastest_of_the_calibration(device):
    """At most 15% slower, in every case that was measured; the whole bench table is among them."""
    if device == "cpp" and EXTENSION is None:
        pytest.skip("no extension, whose rule is its own")
    rows = [row for row in CALIBRATION if row["device"] == device]
    assert {tuple(layer[:5]) for layer in calibrate.grid()} == {tuple(r["layer"]) for r in rows}
    for row in rows:
        seconds = row["seconds"]
        assert len(seconds) >= 2
        chosen = plan.choose(Sizes(*row["layer"]), torch.float32, device)
        assert seconds.get(chosen, math.inf) <= 1.15 * min(seconds.values()), (row, chosen)


def test_the_table_is_in_the_grid():
    layers = [(l.tasks, l.rows, l.in_features, l.out_features) for l in calibrate.grid()]
    for w in WORKLOADS.values():
        if isinstance(w, Workload):
            assert {(w.B, w.B * w.N, i, o) for i, o in w.layers} <= set(layers)


def test_every_plan_that_is_not_hopeless_is_timed():
    rows = calibrate.time_all([Sizes(2, 2, 3, 4, 5), Sizes(2, 200, 3, 4, 50)], "cpu")
    assert [row["layer"] for row in rows] == [(2, 2, 3, 4, 5), (2, 200, 3, 4, 50)]
    assert [set(row["seconds"]) for row in rows] == [set(PLANS), {"tile", "materialize"}]
    assert all(t > 0 for row in rows for t in row["seconds"].values())


def test_a_fit_finds_the_plans_of_a_machine_that_is_as_modelled():
    """Made-up rates, far from where the fit begins, under which each plan wins somewhere."""
    rates = {
        "contract": Work(calls=3e-6, products=2e-5, generated=8e-12),
        "tile": Work(calls=1e-5, head=5e-10, generated=4e-12),
        "materialize": Work(calls=2e-5, head=2e-11, generated=4e-12, stored=5e-10),
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
        "tile": Work(calls=1), "materialize": Work(calls=2)
    })  # fmt: skip
    text = calibration.text([row])
    assert "cpu, fitted: regret 4.00 at worst, 4.000 in the mean, above 1.15 in 1 of 1" in text
    assert '"tile": Work(1, 0, 0, 0, 0, 0, 0, 0)' in text
