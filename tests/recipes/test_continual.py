"""Continual learning: what is forgotten without the regulariser, and the regulariser itself."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from hyperfast.recipes import continual
from hyperfast.recipes.continual import HELD_OUT, TASKS, Generated, TrainedOn, forgetting

pytestmark = pytest.mark.usefixtures("one_thread")


def test_main_forgets_little_with_the_regulariser(recorded, tmp_path, capsys):
    from matplotlib.image import imread

    found = recorded(continual, "learn")
    assert continual.main(["--quick", "--out", str(tmp_path / "a.png")]) == 0
    trained_on, _, free, held = found
    assert all(matrix.diag().min() > 0.85 for matrix in found)  # each task is learned
    assert held[-1].mean() > 0.96
    assert forgetting(held) < 0.03
    assert forgetting(free) > 0.06
    assert forgetting(trained_on) > 0.12
    said = capsys.readouterr().out.splitlines()
    (line,) = (line for line in said if line.startswith("  hypernetwork, beta = 0.1"))
    shown = [100 * held[-1].mean().item(), 100 * forgetting(held).item()]
    assert [float(v) for v in line.split()[-2:]] == pytest.approx(shown, abs=0.051)
    assert "Parameters: classifier 16,802, hypernetwork and 5 latents 11,148" in said
    assert imread(tmp_path / "a.png")[..., :3].std() > 0.1


def test_the_regulariser_is_that_of_the_paper():
    """Equation 2 without its look-ahead: the mean over earlier tasks of squared distances to the
    weights of before."""
    torch.manual_seed(0)
    learner = Generated(0.1)
    trained = learner.begin(2)
    assert {id(p) for p in trained} == {
        *map(id, learner.hyper.parameters()), id(learner.latents[2])
    }  # fmt: skip
    before = [torch.cat([w.flatten() for w in learner.hyper(z)]).detach() for z in learner.latents]
    with torch.no_grad():
        for p in learner.hyper.parameters():
            p.add_(0.01 * torch.randn_like(p))
    now = [torch.cat([w.flatten() for w in learner.hyper(z)]) for z in learner.latents]
    apart = [(a - b).square().sum() for a, b in zip(now, before, strict=True)]
    x, y = torch.rand(9, 64), torch.randint(2, (9,))
    expected = F.cross_entropy(learner(x, 2), y) + 0.1 / 2 * (apart[0] + apart[1])
    loss = learner.loss(x, y, 2)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert [z.grad is not None for z in learner.latents] == [False, False, True, False, False]


def test_outputs_of_a_task():
    shared, apart, x = TrainedOn(1), TrainedOn(TASKS), torch.rand(3, 64)
    for task in range(TASKS):
        assert torch.equal(shared(x, task), shared.net(x))
        assert torch.equal(apart(x, task), apart.net(x)[:, 2 * task : 2 * task + 2])


def test_forgetting_is_from_the_best_to_the_end():
    matrix = torch.tensor([[0.9, 0.5, 0.5], [0.7, 0.8, 0.5], [0.8, 0.6, 1.0]])
    assert forgetting(matrix).item() == pytest.approx((0.1 + 0.2) / 2)
    assert forgetting(torch.stack([matrix, matrix])).shape == (2,)


def test_tasks_are_two_digits_each_and_hold_images_out():
    tasks, other = continual.load(0), continual.load(1)
    assert len(tasks) == TASKS
    assert sum(len(t.x) + len(t.x_held) for t in tasks) == 1797
    seen = {tuple(image) for t in tasks for image in t.x.tolist()}
    for task in tasks:
        assert len(task.x_held) == HELD_OUT
        assert set(task.y.tolist()) == {0, 1}
        assert seen.isdisjoint(map(tuple, task.x_held.tolist()))
    assert not torch.equal(tasks[0].x, other[0].x)
