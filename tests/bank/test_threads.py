"""Many threads on one bank, and many processes on one file."""

import multiprocessing
import os
import threading
import time

import pytest
import torch

from hyperfast import HyperNet, MLPSpec, TargetNet, TaskBank

SECONDS = float(os.environ.get("HYPERFAST_STRESS_SECONDS", "2"))
WIDTH, TASKS = 6, 40


def run(*loops):
    """Runs every loop in a thread of its own until time is up; raises what any of them raised."""
    end, errors, turns = time.monotonic() + SECONDS, [], [0] * len(loops)

    def turn(n, loop):
        try:
            while time.monotonic() < end and not errors:
                loop()
                turns[n] += 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=turn, args=item) for item in enumerate(loops)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error
    assert min(turns) > 0
    return turns


def assert_no_slot_lost(store, used):
    """All slots are used or can be reserved, and each is so once."""
    free = store.reserve(store.slots - used)
    assert len(free.unique()) == len(free) == store.slots - used
    assert not store._free
    assert not store._released


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_a_batch_sees_old_or_new_weights(dtype):
    """All parameters of a task are one number, 1000 task + version: then every output of a row is
    the same, and tells whose weights, of which version, made it."""
    spec = MLPSpec((WIDTH, WIDTH), bias=False)

    def make(tasks, version):
        value = 1000.0 * tasks + version
        return value.float().unsqueeze(1).expand(len(tasks), spec.numel)

    tasks = torch.arange(TASKS)
    bank = TaskBank.from_weights(spec, make(tasks, 0), dtype=dtype, target=TargetNet("identity"))
    versions = [0]
    x = torch.eye(WIDTH)[:1].expand(200, WIDTH)

    def read():
        ids = torch.randint(TASKS, (200,))
        before = versions[0]
        y = bank(x, ids)
        after = versions[0] + 1
        assert bool((y == y[:, :1]).all())
        number = y[:, 0].double().round().long()
        assert torch.equal(number // 1000, ids)
        version = number % 1000
        seen = torch.full((TASKS,), -1).scatter_(0, ids, version)
        assert torch.equal(seen[ids], version)  # all rows of a task alike
        assert version.min() == version.max()  # and all tasks, which change together
        assert before % 1000 <= int(version[0]) <= after % 1000 or after % 1000 < before % 1000

    def update():
        bank.update(tasks, weights=make(tasks, (versions[0] + 1) % 1000))
        versions[0] += 1

    def churn():
        ids = bank.add(weights=make(torch.full((5,), 999), 7))
        assert torch.equal(bank.weights(ids)[:, 0].round(), torch.full((5,), 999007.0))
        bank.remove(ids)
        with pytest.raises(IndexError):
            bank(x[:5], ids)

    run(read, read, read, update, churn, churn)
    assert len(bank) == TASKS
    assert_no_slot_lost(bank.contents.table.weights, TASKS)


def test_a_budget_under_threads():
    torch.manual_seed(0)
    hyper = HyperNet(4, 5, 7, 3, hidden=6)
    z = torch.randn(60, 4)
    full = TaskBank.from_latents(hyper, z)
    bank = TaskBank.from_latents(hyper, z, max_bytes=20 * full.spec.numel * 4)
    x = torch.randn(60, 5)
    want = full(x, torch.arange(60))

    def read():
        ids = torch.randint(50, (int(torch.randint(1, 40, ())),))
        torch.testing.assert_close(bank(x[ids], ids), want[ids])

    def update():  # the same latents: what is read does not change, all the rest does
        ids = torch.randint(50, (3,)).unique()
        bank.update(ids, z[ids])

    def churn():
        ids = bank.add(z[50:])
        torch.testing.assert_close(bank(x[50:], ids), want[50:])
        bank.remove(ids)

    run(read, read, read, update, churn, churn)
    assert bank.contents.table.weights.slots == 20
    assert_no_slot_lost(bank.contents.table.weights, bank.contents.table.resident)
    assert_no_slot_lost(bank.contents.table.latents, 60)


def test_saving_meanwhile(tmp_path):
    """A saved file holds one moment: all of a change or nothing, with and without its log."""
    spec = MLPSpec((2, 2))
    path = tmp_path / "b.safetensors"
    TaskBank.from_weights(spec, torch.zeros(8, spec.numel)).save(path)
    bank = TaskBank.open(path, log=True)
    ids, version = bank.ids(), [0]

    def change():
        version[0] += 1
        bank.update(ids, weights=torch.full((8, spec.numel), float(version[0])))
        bank.remove(bank.add(weights=torch.ones(3, spec.numel)))

    def read():
        before = version[0]
        weights = TaskBank.open(path).weights(ids)
        assert weights.min() == weights.max()
        assert before - 1 <= int(weights[0, 0]) <= version[0]

    run(change, lambda: bank.save(path), read)
    bank.close()
    assert torch.equal(TaskBank.open(path).weights(ids), bank.weights(ids))


def _reader(path, ids, x, results, go):
    torch.set_num_threads(1)
    bank = TaskBank.open(path)
    go.wait()
    y = bank(x, ids)
    dirty, mapping = 0, False
    if os.path.exists("/proc/self/smaps"):
        with open("/proc/self/smaps") as lines:
            for line in lines:
                if "-" in line.split(" ", 1)[0] and ":" not in line.split(" ", 1)[0]:
                    mapping = line.rstrip().endswith(os.path.basename(path))
                elif mapping and line.startswith(("Private_Dirty", "Anonymous")):
                    dirty += int(line.split()[1])
    results.put((y.tolist(), dirty))


def test_processes_share_a_file(tmp_path):
    spec = MLPSpec((16, 16, 3))
    path = str(tmp_path / "b.safetensors")
    bank = TaskBank.from_weights(spec, torch.randn(2000, spec.numel))
    bank.save(path)
    x, ids = torch.randn(500, 16), torch.randint(2000, (500,))
    context = multiprocessing.get_context("spawn")
    results, go = context.Queue(), context.Event()
    readers = [context.Process(target=_reader, args=(path, ids, x, results, go)) for _ in range(2)]
    for reader in readers:
        reader.start()
    go.set()
    for _ in readers:
        y, dirty = results.get(timeout=120)
        torch.testing.assert_close(torch.tensor(y), bank(x, ids))
        assert dirty == 0  # every page is the file's own
    for reader in readers:
        reader.join()
        assert reader.exitcode == 0
