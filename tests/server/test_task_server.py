"""Many requests, one call: who gets what back, and what happens when something goes wrong."""

import concurrent.futures
import os
import pickle
import queue
import subprocess
import sys
import threading
import traceback
from concurrent.futures import CancelledError, ThreadPoolExecutor

import numpy
import pytest
import torch

from hyperfast import MLPSpec, TargetNet, TaskBank, TaskServer
from hyperfast.server.stats import WINDOW, Meter, percentile

LONG = 300  # seconds: what takes as long has failed
SPEC = MLPSpec((3, 3), bias=False)


class Gate:
    """A bank that adds the id of its task to every row. It tells when it is called, and holds every
    call until it is opened."""

    def __init__(self):
        self.called, self.open = threading.Semaphore(0), threading.Event()
        self.calls = []
        self.fails = {}  # task: what a call with it raises

    def __call__(self, x, ids):
        self.calls.append(ids.tolist())
        self.called.release()
        assert self.open.wait(3 * LONG)
        for task, error in self.fails.items():
            if task in ids:
                raise error(task)
        return x + ids.unsqueeze(1)

    def hold(self, server, task=0):
        """Occupies the server: what is submitted from now on waits until the gate is opened."""
        future = server.submit(task, torch.zeros(3))
        assert self.called.acquire(timeout=LONG)
        return future


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.open.set()


def scaling_bank(tasks, cls=TaskBank, **options):
    """Task n multiplies by n, exactly."""
    weights = torch.arange(float(tasks)).view(-1, 1, 1) * torch.eye(3)
    return cls.from_weights(SPEC, [weights], target=TargetNet("identity"), **options)


class GatedBank(TaskBank):
    """A TaskBank whose calls wait for ``gate``."""

    gate: Gate

    def __call__(self, x, task_ids):
        self.gate(x, task_ids)
        return super().__call__(x, task_ids)


# results -----------------------------------------------------------------------------------------


def test_every_request_gets_its_own_rows_back(gate):
    shapes = [(3,), (1, 3), (4, 3), (0, 3), (3,), (2, 3)]
    rows = [torch.randn(shape) for shape in shapes]
    with TaskServer(gate) as server:
        gate.hold(server)
        futures = [server.submit(n, x) for n, x in enumerate(rows)]
        gate.open.set()
        for n, (x, future) in enumerate(zip(rows, futures, strict=True)):
            assert torch.equal(future.result(LONG), x + n)
    assert gate.calls == [[0], [0, 1, 2, 2, 2, 2, 4, 5, 5]]


def test_a_bank_by_ids_and_keys():
    bank = scaling_bank(5, keys=["a", "b", "c", 7, "e"])
    x = torch.randn(2, 3)
    with TaskServer(bank) as server:
        assert torch.equal(server.submit(2, x).result(LONG), 2 * x)
        assert torch.equal(server.submit("b", x).result(LONG), x)
        assert torch.equal(server.submit(bank.keys[7], x).result(LONG), 3 * x)
        with pytest.raises(KeyError, match="nobody"):
            server.submit("nobody", x)
        new = bank.add(weights=-torch.eye(3).view(1, 9), keys=["new"])
        assert torch.equal(server.submit("new", x).result(LONG), -x)
        bank.update(new, weights=torch.zeros(1, 9))
        assert torch.equal(server.submit("new", x).result(LONG), 0 * x)


def test_every_dtype_comes_back_as_it_was(gate):
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
    with TaskServer(gate) as server:
        gate.hold(server)
        futures = [server.submit(1, torch.ones(3, dtype=dtype)) for dtype in dtypes * 2]
        gate.open.set()
        assert [f.result(LONG).dtype for f in futures] == dtypes * 2
    assert gate.calls[1:] == [[1, 1]] * 4


def test_a_result_is_alone_in_memory_and_has_no_gradient(gate):
    """What is pickled must not hold the results of others."""
    with TaskServer(gate) as server:
        gate.hold(server)
        futures = [server.submit(n, torch.ones(3, requires_grad=True)) for n in range(100)]
        gate.open.set()
        result = futures[7].result(LONG)
    assert result.untyped_storage().nbytes() == result.nbytes
    assert len(pickle.dumps(result)) < 1000
    assert not result.requires_grad


def test_a_nan_stays_where_it_is():
    bank = scaling_bank(3)
    with TaskServer(bank) as server:
        futures = [server.submit(1, torch.full((3,), v)) for v in (1.0, torch.nan, 2.0)]
        results = torch.stack([f.result(LONG) for f in futures])
    assert results.isnan().all(1).tolist() == [False, True, False]


# when it calls -----------------------------------------------------------------------------------


def test_what_arrives_during_a_call_makes_up_the_next(gate):
    with TaskServer(gate) as server:
        gate.hold(server)
        futures = [server.submit(n, torch.zeros(3)) for n in range(10)]
        gate.open.set()
        concurrent.futures.wait(futures, LONG)
    assert gate.calls == [[0], list(range(10))]


def test_a_call_has_no_more_rows_than_allowed_but_for_one_request_of_more(gate):
    with TaskServer(gate, max_rows=4) as server:
        gate.hold(server)
        futures = [server.submit(n, torch.zeros(n, 3)) for n in (1, 2, 3, 5, 1)]
        gate.open.set()
        concurrent.futures.wait(futures, LONG)
    assert gate.calls[1:] == [[1, 2, 2], [3] * 3, [5] * 5, [1]]


def answer_two(server, gate):
    """After it the server waits for two requests."""
    gate.hold(server)
    futures = [server.submit(n, torch.zeros(3)) for n in (1, 2)]
    gate.open.set()
    concurrent.futures.wait(futures, LONG)


def test_it_waits_for_those_it_has_just_answered(gate):
    with TaskServer(gate, max_delay=3600, max_rows=3) as server:
        answer_two(server, gate)
        first = server.submit(3, torch.zeros(3))
        with pytest.raises(concurrent.futures.TimeoutError):
            first.result(0.05)
        second = server.submit(4, torch.zeros(3))
        first.result(LONG), second.result(LONG)
    assert gate.calls == [[0], [1, 2], [3, 4]]


def test_it_waits_no_longer_than_a_full_call(gate):
    with TaskServer(gate, max_delay=3600, max_rows=5) as server:
        answer_two(server, gate)
        server.submit(3, torch.zeros(5, 3)).result(LONG)


def test_it_waits_no_longer_than_allowed(gate):
    with TaskServer(gate, max_delay=0.01) as server:
        answer_two(server, gate)
        server.submit(3, torch.zeros(3)).result(LONG)  # nobody else comes
    assert gate.calls == [[0], [1, 2], [3]]


def test_an_idle_server_answers_at_once(gate):
    gate.open.set()
    with TaskServer(gate, max_delay=3600) as server:
        for n in range(5):
            server.submit(n, torch.zeros(3)).result(LONG)
    assert gate.calls == [[n] for n in range(5)]


# errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "rows", "error", "message"),
    [
        (0, [1.0, 2.0, 3.0], TypeError, "rows must be a Tensor, got list"),
        (0, torch.zeros(3, dtype=torch.int64), TypeError, "rows must be a floating-point tensor"),
        (0, torch.zeros(3).to_sparse(), TypeError, "rows must be a dense tensor"),
        (0, torch.zeros(4), ValueError, r"rows must have shape \(n, 3\) or \(3,\), got \(4,\)"),
        (0, torch.zeros(2, 4), ValueError, "rows must have shape"),
        (0, torch.zeros(1, 1, 3), ValueError, "rows must have shape"),
        (0, torch.zeros(()), ValueError, "rows must have shape"),
        (0, torch.zeros(3, device="meta"), ValueError, "rows must be on the device of the bank"),
        (1.0, torch.zeros(3), TypeError, "task must be an int or a str, got 1.0"),
        (True, torch.zeros(3), TypeError, "task must be an int or a str, got True"),
        (-1, torch.zeros(3), IndexError, "task must be in"),
        (1 << 63, torch.zeros(3), IndexError, "task must be in"),
    ],
)
def test_a_wrong_request_is_refused_at_once(task, rows, error, message):
    with TaskServer(scaling_bank(2)) as server:
        with pytest.raises(error, match=message):
            server.submit(task, rows)
        assert server.stats().submitted == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"bank": 3}, TypeError, "bank must be a TaskBank or callable, got int"),
        ({"max_rows": 0}, ValueError, "max_rows must be at least 1"),
        ({"max_waiting": 2.5}, TypeError, "max_waiting must be an int"),
        ({"max_delay": "1"}, TypeError, "max_delay must be a number"),
        ({"max_delay": -1}, ValueError, "max_delay must be finite"),
        ({"max_delay": float("nan")}, ValueError, "max_delay must be finite"),
    ],
)
def test_a_wrong_server_is_refused(arguments, error, message):
    before = threading.active_count()
    with pytest.raises(error, match=message):
        TaskServer(**{"bank": print, **arguments})
    assert threading.active_count() == before


def test_a_callable_has_no_keys_and_a_timeout_is_not_negative(gate):
    with TaskServer(gate) as server:
        with pytest.raises(TypeError, match="bank is no TaskBank"):
            server.submit("a", torch.zeros(3))
        with pytest.raises(ValueError, match="timeout must not be negative"):
            server.submit(0, torch.zeros(3), timeout=-1)


def test_a_task_removed_before_its_call_fails_alone(gate):
    bank = scaling_bank(20, GatedBank)
    bank.gate = gate
    with TaskServer(bank) as server:
        gate.hold(server)
        futures = [server.submit(n, torch.ones(3)) for n in range(20)]
        bank.remove([3, 17])
        gate.open.set()
        for n, future in enumerate(futures):
            if n in (3, 17):
                with pytest.raises(IndexError, match=f"no task of the bank has the id {n}"):
                    future.result(LONG)
            else:
                assert torch.equal(future.result(LONG), torch.full((3,), float(n)))
        stats = server.stats()
    assert (stats.submitted, stats.done, stats.failed) == (21, 19, 2)
    assert stats.calls == 2 + 1 + 2  # all, those that are there, and each that is not


@pytest.mark.parametrize("error", [ValueError, SystemExit, MemoryError])
def test_whatever_a_call_raises_goes_to_the_request_at_fault(gate, error):
    gate.fails[5] = error
    with TaskServer(gate) as server:
        gate.hold(server)
        futures = [server.submit(n, torch.zeros(3)) for n in range(8)]
        gate.open.set()
        for n, future in enumerate(futures):
            assert type(future.exception(LONG)) is (error if n == 5 else type(None))
        server.submit(1, torch.zeros(3)).result(LONG)
        assert server.stats().calls == 1 + (1 + 2 * 3) + 1  # halving eight three times


def test_an_error_tells_of_no_request_of_others(gate):
    """Reports of errors show the variables of every frame, and of what the error came from."""
    gate.fails[1] = KeyError
    with TaskServer(gate) as server:
        gate.hold(server)
        futures = [server.submit(n, torch.zeros(3)) for n in range(4)]
        gate.open.set()
        error = futures[1].exception(LONG)
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    groups = [frame.f_locals["group"] for frame in frames if "group" in frame.f_locals]
    assert [[request.task for request in group] for group in groups] == [[1]] * 2
    assert error.__context__ is None


@pytest.mark.parametrize("answer", [None, torch.zeros(7, 3), torch.zeros(())])
def test_a_wrong_answer_of_a_callable(answer):
    with TaskServer(lambda x, ids: answer) as server:
        error = server.submit(0, torch.zeros(2, 3)).exception(LONG)
        with pytest.raises(ValueError, match="bank must return a Tensor of 2 rows, got"):
            raise error


def test_requests_of_other_widths_are_called_apart(gate):
    """A callable may refuse a width; that of others is none of its business."""
    with TaskServer(gate) as server:
        gate.hold(server)
        futures = [server.submit(1, torch.zeros(n)) for n in (3, 4, 3, 4)]
        gate.open.set()
        assert [len(f.result(LONG)) for f in futures] == [3, 4, 3, 4]
    assert gate.calls[1:] == [[1, 1], [1, 1]]


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_a_callback_that_raises_hurts_nobody(gate, error, caplog):
    def callback(future):
        raise error

    with TaskServer(gate) as server:
        gate.hold(server)
        futures = [server.submit(n, torch.zeros(3)) for n in range(3)]
        futures[0].add_done_callback(callback)
        gate.open.set()
        concurrent.futures.wait(futures, LONG)
        server.submit(1, torch.zeros(3)).result(LONG)
    assert error.__name__ in caplog.text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("method", ["_next", "_begin", "_answer_all", "_answer"])
def test_no_future_is_lost_when_the_worker_dies(gate, method, monkeypatch):
    def fail_once(*args):
        monkeypatch.undo()
        raise ZeroDivisionError

    server = TaskServer(gate, max_waiting=4)
    held = gate.hold(server)
    waiting = [server.submit(n, torch.zeros(3)) for n in range(4)]
    waiting[2].cancel()
    with ThreadPoolExecutor(6) as pool:
        blocked = [pool.submit(server.submit, 9, torch.zeros(3)) for _ in range(6)]
        with pytest.raises(concurrent.futures.TimeoutError):
            blocked[0].result(0.05)
        monkeypatch.setattr(server, method, fail_once)
        gate.open.set()
        errors = [b.exception(LONG) for b in blocked]
    assert not concurrent.futures.wait([held, *waiting], LONG).not_done
    assert waiting[2].cancelled()
    for future in (waiting[0], waiting[1], waiting[3]):
        with pytest.raises(RuntimeError, match="the server's thread ended") as raised:
            future.result(0)
        assert isinstance(raised.value.__cause__, ZeroDivisionError)
    assert {type(error) for error in errors} <= {type(None), RuntimeError}
    server._worker.join(LONG)
    assert (server.stats().running, server.stats().waiting) == (0, 0)
    with pytest.raises(RuntimeError, match="the server is closed"):
        server.submit(0, torch.zeros(3))
    server.close()


# cancellation ------------------------------------------------------------------------------------


def test_a_waiting_request_can_be_cancelled_and_a_running_one_cannot(gate):
    with TaskServer(gate) as server:
        running = gate.hold(server)
        futures = [server.submit(n, torch.zeros(3)) for n in (1, 2, 3)]
        assert futures[1].cancel()
        assert not running.cancel()
        assert running.running()
        gate.open.set()
        assert not concurrent.futures.wait([running, *futures], LONG).not_done
        assert running.result(0).tolist() == [0, 0, 0]
        with pytest.raises(CancelledError):
            futures[1].result(0)
        stats = server.stats()
    assert gate.calls == [[0], [1, 3]]
    assert (stats.done, stats.cancelled, stats.failed) == (3, 1, 0)


def test_a_batch_of_cancelled_requests_makes_no_call(gate):
    with TaskServer(gate) as server:
        gate.hold(server)
        futures = [server.submit(n, torch.zeros(3)) for n in (1, 2)]
        assert all(f.cancel() for f in futures)
        gate.open.set()
        assert not concurrent.futures.wait(futures, LONG).not_done
        server.submit(4, torch.zeros(3)).result(LONG)
    assert gate.calls == [[0], [4]]


# backpressure ------------------------------------------------------------------------------------


def test_a_full_server_refuses_or_waits(gate):
    with TaskServer(gate, max_waiting=2) as server:
        futures = [gate.hold(server), *(server.submit(n, torch.zeros(3)) for n in (1, 2))]
        for timeout in (0, 0.01):
            with pytest.raises(queue.Full, match="2 requests wait"):
                server.submit(3, torch.zeros(3), timeout=timeout)
        assert server.stats().refused == 2
        with ThreadPoolExecutor(8) as pool:
            blocked = [pool.submit(server.submit, n, torch.zeros(3)) for n in range(8)]
            with pytest.raises(concurrent.futures.TimeoutError):
                blocked[0].result(0.05)
            assert server.stats().waiting == 2
            gate.open.set()
            futures += [b.result(LONG) for b in blocked]
        assert not concurrent.futures.wait(futures, LONG).not_done
        assert server.stats().submitted == len(futures) == 11


def test_a_callback_never_waits_for_room(gate):
    """It runs in the thread that alone could make room."""
    found = queue.Queue()

    def callback(future):
        try:
            for n in range(3):
                found.put(server.submit(n, torch.zeros(3)))
        except queue.Full as error:
            found.put(error)

    with TaskServer(gate, max_waiting=2) as server:
        gate.hold(server).add_done_callback(callback)
        gate.open.set()
        first, second, error = (found.get(timeout=LONG) for _ in range(3))
        assert isinstance(error, queue.Full)
        assert first.result(LONG).tolist() == [0, 0, 0]
        assert second.result(LONG).tolist() == [1, 1, 1]


# closing -----------------------------------------------------------------------------------------


def test_close_answers_what_waits(gate):
    server = TaskServer(gate, max_delay=3600)
    futures = [gate.hold(server), *(server.submit(n, torch.zeros(3)) for n in range(5))]
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(server.close)
        with pytest.raises(concurrent.futures.TimeoutError):
            closing.result(0.05)
        gate.open.set()
        closing.result(LONG)
    assert [f.result(0)[0] for f in futures] == [0, *range(5)]
    with pytest.raises(RuntimeError, match="the server is closed"):
        server.submit(0, torch.zeros(3))
    server.close()
    assert server.stats().done == 6


def test_close_can_cancel_what_waits(gate):
    server = TaskServer(gate)
    running = gate.hold(server)
    futures = [server.submit(n, torch.zeros(3)) for n in range(5)]
    futures[0].cancel()
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(server.close, cancel=True)
        assert not concurrent.futures.wait(futures, LONG).not_done  # while the gate is shut
        gate.open.set()
        closing.result(LONG)
    assert all(f.cancelled() for f in futures)
    assert running.result(0) is not None
    stats = server.stats()
    assert (stats.done, stats.cancelled, stats.waiting, stats.running) == (1, 5, 0, 0)


def test_a_block_that_raises_cancels(gate):
    def block():
        with TaskServer(gate) as server:
            futures.append(gate.hold(server))
            futures.append(server.submit(1, torch.zeros(3)))
            futures[1].add_done_callback(lambda future: gate.open.set())
            raise KeyError("mine")

    futures = []
    with pytest.raises(KeyError, match="mine"):
        block()
    assert futures[0].result(0) is not None
    assert futures[1].cancelled()


def test_close_turns_away_who_waits_for_room(gate):
    server = TaskServer(gate, max_waiting=1)
    gate.hold(server)
    server.submit(1, torch.zeros(3))
    with ThreadPoolExecutor(2) as pool:
        blocked = pool.submit(server.submit, 2, torch.zeros(3))
        with pytest.raises(concurrent.futures.TimeoutError):
            blocked.result(0.05)
        closing = pool.submit(server.close)
        with pytest.raises(RuntimeError, match="the server is closed"):
            blocked.result(LONG)
        gate.open.set()
        closing.result(LONG)


def test_a_callback_may_close(gate):
    server = TaskServer(gate)
    future = gate.hold(server)
    future.add_done_callback(lambda _: server.close())
    last = server.submit(1, torch.zeros(3))
    gate.open.set()
    assert last.result(LONG).tolist() == [1, 1, 1]
    server._worker.join(LONG)
    assert not server._worker.is_alive()


@pytest.mark.parametrize("cancel", [False, True])
def test_close_under_load_loses_nothing(cancel):
    """Eight threads submit until they are refused; each future they got is answered or cancelled
    when close returns."""
    server = TaskServer(lambda x, ids: x + ids.unsqueeze(1), max_waiting=50)
    started = threading.Barrier(9)
    futures = [[] for _ in range(8)]

    def client(n):
        while True:
            try:
                futures[n].append((n, server.submit(n, torch.zeros(3))))
            except RuntimeError:
                return
            if len(futures[n]) == 100:
                started.wait(LONG)

    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(client, n) for n in range(8)]
        started.wait(LONG)
        server.close(cancel=cancel)
        taken = [pair for list_ in futures for pair in list_]
        assert all(future.done() for _, future in taken)
        for c in clients:
            c.result(LONG)
    stats = server.stats()
    assert stats.submitted == len(taken) == stats.done + stats.cancelled
    assert (stats.waiting, stats.failed) == (0, 0)
    for n, future in taken:
        assert future.cancelled() or future.result(0).tolist() == [n] * 3
    assert cancel or not stats.cancelled


EXIT = """
import os, sys, threading, warnings, torch, hyperfast

def bank(x, ids):
    assert go.wait(300)
    return x + ids.unsqueeze(1)

go = threading.Event()
server = hyperfast.TaskServer(bank, max_rows=3)
def told(future):
    print(int(future.result()[0]), flush=True)
for n in range(20):
    server.submit(n, torch.zeros(2)).add_done_callback(told)
if hasattr(os, "fork"):
    warnings.simplefilter("ignore")  # that there are threads
    if os.fork() == 0:
        try:
            server.submit(0, torch.zeros(2))
        except RuntimeError as error:
            print(error, flush=True)
            sys.exit(7)  # by way of atexit
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
go.set()
"""


def test_the_interpreter_exits_when_all_is_answered():
    run = subprocess.run([sys.executable, "-c", EXIT], capture_output=True, text=True, timeout=LONG)
    assert run.returncode == 0, run.stderr
    forked = ["the server is closed"] if hasattr(os, "fork") else []
    assert run.stdout.split("\n")[:-1] == [*forked, *map(str, range(20))]


# stats -------------------------------------------------------------------------------------------


def test_stats_count_and_are_shown(gate):
    with TaskServer(gate) as server:
        assert server.stats().p99 != server.stats().p99  # that is, NaN
        gate.hold(server)
        futures = [server.submit(n, torch.zeros(2, 3)) for n in range(4)]
        stats = server.stats()
        assert (stats.submitted, stats.waiting, stats.running, stats.done) == (5, 4, 1, 0)
        gate.open.set()
        concurrent.futures.wait(futures, LONG)
    stats = server.stats()
    assert (stats.submitted, stats.waiting, stats.running, stats.done) == (5, 0, 0, 5)
    assert (stats.calls, stats.rows) == (2, 9)
    assert 0 < stats.p50 <= stats.p90 <= stats.p99 < LONG
    for part in ("5 requests: 5 done", "2 calls, 4.5 rows each", "p99"):
        assert part in str(stats)


def test_percentiles():
    meter = Meter()
    meter.latencies.extend(float(n) for n in range(1, 101))
    stats = meter.read(waiting=0)
    assert (stats.p50, stats.p90, stats.p99) == (50, 90, 99)
    assert percentile([3.0], 0.5) == percentile([3.0], 0.99) == 3
    meter.latencies.extend([0.5] * WINDOW)
    assert len(meter.latencies) == WINDOW
    assert meter.read(waiting=0).p99 == 0.5


def test_tasks_of_any_integer_kind():
    spec = MLPSpec((3, 2))
    bank = TaskBank.from_weights(spec, torch.randn(4, spec.numel), keys=["a", "b", "c", "d"])
    x = torch.randn(3)
    want = bank(x[None], torch.tensor([2]))[0]
    with TaskServer(bank, max_delay=numpy.float32(0.001)) as server:
        for task in (2, numpy.int64(2), numpy.uint8(2), torch.tensor(2), "c", numpy.str_("c")):
            assert torch.equal(server.submit(task, x).result(60), want)
        for wrong in (True, numpy.True_, torch.tensor(True), 2.0, None):
            with pytest.raises(TypeError, match="task must be an int or a str"):
                server.submit(wrong, x)
