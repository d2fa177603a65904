"""A forked process inherits a bank, and locks and files that are its parent's."""

import os
import pickle
import signal
import threading
import time
import traceback

import pytest
import torch

from hyperfast import HyperNet, MLPSpec, TaskBank, TaskServer
from hyperfast.bank.file import BankFileError

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning"),
]


class Child:
    """Runs ``work`` in a forked process; ``join`` raises what it raised there. Kernels may hang in
    a child after they have used threads, as torch's own do: a test's children have one thread."""

    def __init__(self, work, *args):
        self.out, into = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                torch.set_num_threads(1)
                os.write(into, pickle.dumps(work(*args)))
            except BaseException:
                os.write(into, b"!" + traceback.format_exc().encode())
            finally:
                os._exit(0)
        os.close(into)

    def join(self, patience=60):
        end = time.monotonic() + patience
        while os.waitpid(self.pid, os.WNOHANG) == (0, 0):
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                pytest.fail("the child hangs")
            time.sleep(0.01)
        said = os.read(self.out, 1 << 16)  # not to its end: a grandchild may have it open
        os.close(self.out)
        if said[:1] == b"!":
            pytest.fail(said[1:].decode())
        return pickle.loads(said)


@pytest.fixture
def hyper():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield HyperNet(5, 4, 8, 3)
    torch.set_num_threads(threads)


@pytest.fixture
def path(tmp_path, hyper):
    path = tmp_path / "bank"
    TaskBank.from_latents(hyper, torch.zeros(6, 5), keys=range(6)).save(path)
    return path


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def refused(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except OSError as error:
        return "fork" in str(error)
    return False


def test_a_child_reads_and_changes_nothing(path, hyper):
    bank = TaskBank.open(path, hyper=hyper, log=True)
    bank.add(torch.ones(1, 5), keys=["before"])
    x, ids = torch.randn(4, 4), torch.tensor([0, 3, 5, 6])
    want, before = bank(x, ids), files(path.parent)
    z = torch.ones(1, 5)

    def child():
        changes = [
            refused(bank.add, z, keys=["child"]),
            refused(bank.add, weights=torch.ones(1, bank.spec.numel)),
            refused(bank.update, [1], z),
            refused(bank.remove, [1]),
            refused(bank.save, path),
        ]
        right = torch.equal(bank(x, ids), want)
        bank.close()
        bank.close()
        return (*changes, refused(bank.add, z), right, len(bank), "child" in bank.keys)

    assert Child(child).join() == (*[True] * 7, 7, False)
    assert files(path.parent) == before
    # The lock is still this process's, and so are changes.
    with pytest.raises(BankFileError, match="written by another bank"):
        TaskBank.open(path, log=True)
    bank.add(z, keys=["after"])
    bank.save(path)
    bank.close()
    again = TaskBank.open(path, hyper=hyper, verify=True)
    assert len(again) == 8
    assert {"before", "after"} <= again.keys.keys()


def test_a_child_saves_elsewhere_and_changes_copies(path, hyper):
    bank = TaskBank.open(path, hyper=hyper, log=True)
    bank.add(torch.ones(1, 5))

    def child():
        bank.save(path.with_name("elsewhere"))
        copy = pickle.loads(pickle.dumps(bank))
        return copy.add(torch.ones(2, 5)).tolist(), len(TaskBank.open(path)), len(bank)

    assert Child(child).join() == ([7, 8], 7, 7)
    assert len(TaskBank.open(path.with_name("elsewhere"))) == 7
    bank.close()


@pytest.mark.parametrize("end", ["close", "killed"])
def test_a_child_does_not_keep_the_lock(path, hyper, end):
    """The log can be opened as soon as its owner has let go, though a child of it lives on."""
    go, ready = os.pipe()
    lives, forked = os.pipe()

    def owner():
        bank = TaskBank.open(path, hyper=hyper, log=True)
        child = os.fork()
        if child == 0:
            os.write(forked, b"x")
            os.read(go, 1)
            os._exit(0)
        os.read(lives, 1)  # the child has let go, which it does as it starts
        if end == "close":
            bank.close()
            bank = TaskBank.open(path, hyper=hyper, log=True)
            bank.add(torch.ones(1, 5))
        return child

    Child(owner).join()  # ends without closing: as if it were killed
    bank = TaskBank.open(path, hyper=hyper, log=True)
    assert len(bank) == 6 + (end == "close")
    bank.close()
    os.write(ready, b"x")


def test_a_fork_past_the_hooks(path, hyper, monkeypatch):
    """As by a C library: what the child still has open, it neither writes nor unlocks."""
    bank = TaskBank.open(path, hyper=hyper, log=True)
    monkeypatch.setattr(bank.contents.log.file, "after_fork", lambda: None)
    before = files(path.parent)

    def child():
        changes = refused(bank.add, torch.ones(1, 5)), refused(bank.save, path)
        bank.close()
        return changes

    assert Child(child).join() == (True, True)
    assert files(path.parent) == before
    with pytest.raises(BankFileError, match="written by another bank"):
        TaskBank.open(path, log=True)
    bank.close()
    TaskBank.open(path, log=True).close()


def test_without_a_log_both_change_their_own(hyper):
    bank = TaskBank.from_latents(hyper, torch.zeros(6, 5))

    def child():
        bank.remove([0, 1])
        return bank.add(torch.ones(1, 5)).tolist(), bank.ids().tolist()

    child = Child(child)
    assert bank.add(torch.ones(3, 5)).tolist() == [6, 7, 8]
    assert child.join() == ([1 << 32], [1 << 32, 2, 3, 4, 5])
    assert len(bank) == 9


def test_forks_while_threads_write(path, hyper):
    """Whatever another thread holds at the time of a fork: a change, a lock of the table, a file
    half written. The child reads, changes a bank without a log, and ends; nothing that this process
    acknowledged is lost."""
    logged = TaskBank.open(path, hyper=hyper, log=True)
    plain = TaskBank.from_weights(MLPSpec((2, 2)), torch.zeros(8, 6))
    budget = TaskBank.from_latents(hyper, torch.zeros(40, 5), max_bytes=9 * 4 * hyper.spec.numel)
    stop, errors, added = threading.Event(), [], [0]

    def run(work):
        try:
            while not stop.is_set():
                work()
        except BaseException as error:
            errors.append(error)

    def change():
        logged.add(torch.ones(2, 5))
        added[0] += 2

    def churn():
        plain.remove(plain.add(weights=torch.ones(3, 6)))
        budget(torch.ones(5, 4), torch.randint(40, (5,)))

    def child():
        task = plain.add(weights=torch.ones(1, 6))
        plain.update(task, weights=torch.zeros(1, 6))
        plain.remove(task)
        budget(torch.ones(5, 4), torch.arange(5))
        budget.update([1], torch.ones(1, 5))
        plain.save(path.with_name(f"of {os.getpid()}"))
        found = refused(logged.add, torch.ones(1, 5))
        logged.close()
        return found and bool((logged.weights([0]) == logged.weights([1])).all())

    work = (change, churn, lambda: logged.save(path))
    threads = [threading.Thread(target=run, args=(one,)) for one in work]
    for thread in threads:
        thread.start()
    for _ in range(40):
        assert Child(child).join()
    stop.set()
    for thread in threads:
        thread.join()
    logged.close()
    assert not errors
    assert added[0] > 20
    again = TaskBank.open(path, hyper=hyper, verify=True)
    assert len(again) == 6 + added[0]


def test_a_server_is_closed_in_a_child(hyper):
    bank = TaskBank.from_latents(hyper, torch.zeros(6, 5))
    with TaskServer(bank) as server:
        server.submit(0, torch.zeros(4)).result(60)

        def child():
            try:
                server.submit(0, torch.zeros(4))
            except RuntimeError as error:
                said = str(error)
            submitted = server.stats().submitted
            server.close()
            with TaskServer(bank) as own:
                return said, submitted, own.submit(1, torch.zeros(4)).result(60).shape[0]

        for _ in range(5):
            assert Child(child).join() == ("the server is closed", 1, 3)
        assert server.submit(0, torch.zeros(4)).result(60).shape == (3,)
