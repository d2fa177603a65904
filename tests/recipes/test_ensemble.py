"""The ensemble: its gain, its twin in a loop, its intervals."""

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from hyperfast.recipes import ensemble
from hyperfast.recipes.ensemble import HELD_OUT, MEMBERS, intervals

pytestmark = pytest.mark.usefixtures("one_thread")


def test_main_learns_what_the_loop_learns_and_its_intervals_hold(recorded, capsys):
    data, trained, ends = (recorded(ensemble, name) for name in ("load", "train", "intervals"))
    assert ensemble.main(["--quick"]) == 0
    (together, _), (loop, _) = trained
    assert loop.shape == (20, MEMBERS)
    torch.testing.assert_close(together[:20], loop, rtol=1e-4, atol=0)
    assert together[-1].max() < 0.55  # of the variance, which is where all start
    y = data[0].y_held
    lower, upper = ends[0]
    assert 0.83 <= ((lower <= y) & (y <= upper)).float().mean() <= 0.97
    assert (upper - lower).mean() < 2.8  # a normal law of their variance would need 3.3
    said = capsys.readouterr().out.splitlines()
    error = {line[:28].strip(): float(line[28:]) for line in said if line[30:].strip()[2:3] == "."}
    assert error["the ensemble's mean"] < 56 < 75 < error["the mean of those learned"]


def test_held_out_patients_are_in_no_sample_to_learn_from():
    data, other = ensemble.load(), ensemble.load(seed=1)
    assert (len(data.x), len(data.x_held)) == (442 - HELD_OUT, HELD_OUT)
    seen = {tuple(row) for row in data.x.tolist()}
    assert seen.isdisjoint(map(tuple, data.x_held.tolist()))
    assert not torch.equal(data.x, other.x)


def test_intervals_hold_as_often_as_meant_for_errors_of_any_law():
    """Members that know the mean, and errors of heavy tails."""
    generator = torch.Generator().manual_seed(0)
    y, held = (torch.randn(4000, generator=generator) ** 3 for _ in range(2))
    rows = torch.randint(4000, (20, 4000), generator=generator)
    lower, upper = intervals(torch.zeros(20, 4000), torch.zeros(20, 4000), y, rows, cover=0.8)
    assert ((lower <= held) & (held <= upper)).float().mean() == pytest.approx(0.8, abs=0.02)


def test_a_row_is_judged_by_members_that_have_not_seen_it():
    """Two members, each right where it has learned and one off elsewhere, in another direction."""
    rows = torch.tensor([[0, 0], [1, 1]])
    seen = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    unseen = torch.tensor([[10.0], [20.0]])
    lower, upper = intervals(seen, unseen, torch.zeros(2), rows, cover=0.6)
    assert (lower.item(), upper.item()) == (9, 21)
