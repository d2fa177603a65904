"""The Ray recipe, run for real by two actors of a local Ray; skipped where there is no Ray."""

import os
from pathlib import Path

import pytest
import torch

import hyperfast
from hyperfast import MLPSpec, TaskBank

ray = pytest.importorskip("ray", reason="needs the extra ray")
pytest.importorskip("ray.data", reason="needs the extra ray")

# Whatever Ray and what it imports have to say of themselves.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def cluster():
    path = os.pathsep.join([str(Path(hyperfast.__file__).parents[1]), str(Path(__file__).parent)])
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )
    yield
    ray.shutdown()


def test_main_equals_the_bank(cluster, capsys):
    from hyperfast.recipes import ray_batch

    assert ray_batch.main(tasks=50, count=2000) < 1e-5  # NaN where a row is missing
    assert "2000 rows of 50 tasks" in capsys.readouterr().out


def test_other_columns_stay_with_their_rows(cluster, tmp_path):
    from hyperfast.recipes import ray_batch

    spec = MLPSpec((3, 1), bias=False)
    path = str(tmp_path / "b.safetensors")
    TaskBank.from_weights(spec, torch.arange(7.0).unsqueeze(1).expand(7, 3)).save(path)
    rows = ray_batch.dataset(x=torch.ones(40, 3), task_id=torch.arange(40) % 7, n=torch.arange(40))
    found = ray_batch.predict(rows, path, batch_size=6).take_all()
    assert sorted(row["n"] for row in found) == list(range(40))
    assert all(row["y"].item() == 3 * (row["n"] % 7) == 3 * row["task_id"] for row in found)
