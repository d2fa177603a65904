"""Offline inference by Ray Data, on a cluster that is there already.

Rows are brought to actors, each of which maps the file of one bank.
``python -m hyperfast.recipes.ray_batch`` does so on this machine, on random networks and rows, and
compares with the bank itself. Needs the extra ``ray``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import ray
import torch

from hyperfast import HyperNet, TaskBank


class Networks:
    """What an actor keeps: the bank. Its weights are mapped, not read: actors on one machine share
    them, and only the pages of tasks that come up are ever loaded."""

    def __init__(self, path: str):
        self.bank = TaskBank.open(path)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        x, ids = (torch.tensor(batch[name], device=self.bank.device) for name in ("x", "task_id"))
        return batch | {"y": self.bank(x, ids).numpy()}


def predict(
    rows: ray.data.Dataset, path: str, *, actors: int = 1, batch_size: int = 4096
) -> ray.data.Dataset:
    """Adds to every row what its task's network makes of it.

    Rows that are sorted by task, as far as they are, touch fewer pages in each batch. Ray does not
    keep the order of rows; the other columns come along to tell them apart.

    Args:
        rows: with columns ``x (in,)``, floating-point, and ``task_id``, int64; and any others.
        path: a saved bank, under the same path on every node.
        actors: how many processes run it, a CPU each, for as long as there are rows: if they take
            all CPUs, nothing is left to make rows that are not there yet.
        batch_size: rows of a call.

    Returns:
        ``rows`` with a column ``y (out,)``, lazily, as Ray Data does.
    """
    return rows.map_batches(
        Networks,
        fn_constructor_args=(path,),
        compute=ray.data.ActorPoolStrategy(size=actors),
        batch_size=batch_size,
        batch_format="numpy",
    )


def dataset(**columns: torch.Tensor) -> ray.data.Dataset:
    """Rows of a dataset from tensors of as many rows."""
    parts = [
        ray.data.from_numpy([column.numpy()]).rename_columns({"data": name})
        for name, column in columns.items()
    ]
    return parts[0].zip(*parts[1:])


def main(tasks: int = 20_000, count: int = 200_000) -> float:
    """Predicts by two actors, and returns the largest difference from the bank itself."""
    torch.manual_seed(0)
    bank = TaskBank.from_latents(HyperNet(16, 64, 64, 10), torch.randn(tasks, 16))
    x, ids = torch.randn(count, 64), torch.randint(tasks, (count,)).sort().values
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "bank.safetensors")
        bank.save(path)
        rows = dataset(x=x, task_id=ids, row=torch.arange(count))
        rows = rows.repartition(8).materialize()  # two actors may leave no CPU for it later
        found = predict(rows, path, actors=2).materialize()
    y = torch.full((count, 10), torch.nan)
    for block in found.iter_batches(batch_size=None, batch_format="numpy"):
        y[torch.tensor(block["row"])] = torch.tensor(block["y"])
    worst = float((y - bank(x, ids)).abs().max())
    print(f"{count} rows of {tasks} tasks; largest difference from the bank itself: {worst:.1e}")
    return worst


if __name__ == "__main__":
    ray.init(include_dashboard=False, log_to_driver=False)
    main()
