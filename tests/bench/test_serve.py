"""The benchmark of TaskServer: that it finds what is wrong, and a short run under load."""

import json
import os

import pytest
import torch

import hyperfast
from bench.serve import clients
from bench.serve.__main__ import main
from bench.serve.stress import stress

SECONDS = float(os.environ.get("HYPERFAST_STRESS_SECONDS", "1"))


def test_a_server_at_saturation_loses_nothing_and_is_right():
    found = stress(SECONDS)
    assert found["errors"] == []
    assert found["lost"] == 0
    assert min(found["answered"], found["removed"]) > 0
    assert max(found["waiting"]) > 64  # more than one a client: it is at saturation


def test_stress_tells_a_wrong_answer_and_one_for_a_task_that_is_gone():
    def mixed(bank):
        """Gives every row what the next one should get, and never says that a task is gone."""
        return lambda x, ids: bank(x, ids.clamp(max=40)).roll(1, 0)

    errors = stress(0.1, clients=2, tasks=50, bank=mixed)["errors"]
    assert len(errors) == 1
    assert "times wrong answer" in errors[0]


def test_every_way_is_right_and_a_wrong_one_is_found():
    bank = clients.make_bank(20)
    with hyperfast.TaskServer(bank) as server:
        for ask in clients.ways(bank, server).values():
            assert all(0 < t < 10 for t in clients.turn(bank, ask, clients=3, seconds=0.02))
        with pytest.raises(AssertionError):
            clients.turn(bank, lambda task, row: torch.zeros(10), clients=1, seconds=0.01)


def test_main_saves_what_it_measures_and_keeps_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(clients, "TASKS", 20)
    path = tmp_path / "serve.json"
    path.write_text('{"stress": {"lost": 0}}')
    command = ["--clients", "1", "3", "--rounds", "2", "--seconds", "0.02", "--json", str(path)]
    assert main(command) == 0
    saved = json.loads(path.read_text())
    assert saved["stress"] == {"lost": 0}
    rows = saved["turns"]["results"]
    assert [row["clients"] for row in rows] == [1] * 3 + [3] * 3
    for row in rows:
        assert row["ratio"] == 1 if row["way"] == "TaskServer" else row["ratio"] > 0
        assert row["p50_ms"] <= row["p99_ms"]
