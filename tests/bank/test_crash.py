"""A bank outlives the death of its process: nothing that was acknowledged is lost."""

import multiprocessing
import os
import random
import time
import warnings

import pytest
import torch

from hyperfast import HyperNet, TaskBank

KILLS = int(os.environ.get("HYPERFAST_KILLS", "5"))


def make_hyper():
    torch.manual_seed(0)
    return HyperNet(4, 5, 7, 3, hidden=6)


def change(bank, step):
    """The change numbered ``step``: it depends on the number and on the ids in the bank only."""
    rng = random.Random(step)
    z = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
    ids = bank.ids().tolist()
    kind = rng.choice(["add", "add", "weights", "remove", "update"]) if len(ids) > 5 else "add"
    if kind == "add":
        count = rng.randint(1, 3)
        bank.add(z[:count], keys=[f"{step}.{n}" for n in range(count)])
    elif kind == "weights":
        bank.add(weights=z.flatten()[:1].expand(2, 66))
    elif kind == "remove":
        bank.remove(rng.sample(ids, rng.randint(1, 4)))
    else:
        some = rng.sample(ids, rng.randint(1, 3))
        bank.update(some, z[: len(some)])


def work(path, acknowledged):
    """Changes and saves until it is killed; writes a byte for every acknowledged change."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of a torn tail
    bank = TaskBank.open(path, hyper=make_hyper(), log=True)
    done = os.open(acknowledged, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    while True:
        change(bank, bank.contents.sequence + 1)
        os.write(done, b".")
        if bank.contents.sequence % 13 == 0:
            bank.save(path)


@pytest.mark.skipif(os.name != "posix", reason="needs a process that can be killed at any moment")
@pytest.mark.parametrize("kwargs", [{}, {"dtype": torch.int8}])
def test_killed_at_any_moment(tmp_path, kwargs):
    path, acknowledged = str(tmp_path / "b.safetensors"), str(tmp_path / "acknowledged")
    hyper = make_hyper()
    TaskBank.from_latents(hyper, torch.zeros(3, 4), **kwargs).save(path)
    twin = TaskBank.from_latents(hyper, torch.zeros(3, 4), **kwargs)  # never killed
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hyperfast"])
    rng = random.Random(time.time_ns())
    for _ in range(KILLS):
        open(acknowledged, "wb").close()
        before = twin.contents.sequence
        process = context.Process(target=work, args=(path, acknowledged))
        process.start()
        while not os.path.getsize(acknowledged) and process.is_alive():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.15))
        process.kill()
        process.join()
        assert process.exitcode == -9
        known = before + os.path.getsize(acknowledged)
        bank = TaskBank.open(path, hyper=hyper, verify=True)
        # The change under way when it died may be there or not.
        assert bank.contents.sequence in (known, known + 1)
        while twin.contents.sequence < bank.contents.sequence:
            change(twin, twin.contents.sequence + 1)
        ids = twin.ids()
        assert torch.equal(bank.ids(), ids)
        assert torch.equal(bank.weights(ids), twin.weights(ids))
        assert bank.keys == twin.keys
    assert twin.contents.sequence > KILLS
