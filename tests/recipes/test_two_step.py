"""The two-step game: what each team learns, beside what it can learn at best."""

import importlib.util

import pytest
import torch

pytest.importorskip("tqdm")

from hyperfast.recipes import two_step
from hyperfast.recipes.two_step import PAYOFFS, Sum, Team, additive, values

pytestmark = pytest.mark.usefixtures("one_thread")


def test_qmix_earns_eight_and_vdn_seven(recorded, capsys):
    teams = recorded(two_step, "train")
    assert two_step.main(["--quick"]) == 0
    vdn, qmix = teams
    assert (vdn.play(), qmix.play()) == (7, 8)
    torch.testing.assert_close(vdn.table(), values(additive), rtol=0, atol=0.25)
    torch.testing.assert_close(qmix.table(), values(lambda p: p), rtol=0, atol=0.1)
    said = capsys.readouterr().out
    assert "VDN: joint values, and greedy play earns 7" in said
    assert "QMIX: joint values, and greedy play earns 8" in said


def test_values_of_the_game_are_those_of_the_paper():
    table = [[[6.93, 6.93], [7.92, 7.92]], [[7.0, 7.0], [7.0, 7.0]], [[0.0, 1.0], [1.0, 8.0]]]
    torch.testing.assert_close(values(lambda p: p), torch.tensor(table))


def test_the_best_sum_is_least_squares():
    """Of sums of a row's and a column's value: what is left of the payoffs has no such part."""
    fit = additive(PAYOFFS)
    assert (fit[:, 0, 0] + fit[:, 1, 1] == fit[:, 0, 1] + fit[:, 1, 0]).all()
    left = PAYOFFS - fit
    assert (left.sum(1) == 0).all()
    assert (left.sum(2) == 0).all()


def test_the_first_agent_decides_where_the_second_actions_are_paid():
    team = Team(Sum())
    utilities = torch.zeros(3, 2, 2)
    utilities[2, :, 1] = 1  # B in 2B, by both

    def play(first):
        utilities[0, 0] = torch.tensor([1.0, 0.0]) if first == "A" else torch.tensor([0.0, 1.0])
        team.utilities = lambda state: utilities[state]
        return team.play()

    assert (play("A"), play("B")) == (7, 8)


def test_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        two_step.main([])
    error = capsys.readouterr().err
    assert "tqdm not found" in error
    assert "pip install 'hyperfast[demo]'" in error
