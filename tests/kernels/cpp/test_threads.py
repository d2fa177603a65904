"""``torch.set_num_threads`` is obeyed, and small work stays on the thread that asks for it."""

import os
import threading
import time
from pathlib import Path

import pytest
import torch

from hyperfast.layout import Generated
from hyperfast.plans.cpu import EXTENSION, EXTENSION_ERROR

TASKS = Path("/proc/self/task")
if EXTENSION is None:
    pytest.skip(EXTENSION_ERROR, allow_module_level=True)
if not (TASKS / str(os.getpid()) / "schedstat").exists():
    pytest.skip("needs Linux's account of every thread's time", allow_module_level=True)
op = torch.ops.hyperfast

LARGE, SMALL = (256, 4, 64, 64, 64), (1, 1, 32, 32, 32)


def calls(tasks, rows, ins, outs, features, plans=("tile", "materialize")):
    """One of every op, by these plans."""
    x, g, h = (
        torch.randn(tasks, rows, ins),
        torch.randn(tasks, rows, outs),
        torch.randn(tasks, features),
    )
    head, weight = torch.randn(outs * (ins + 1), features), torch.randn(tasks, outs, ins)
    made = Generated.of_head(head, None, ins, True)

    def run():
        op.task_linear(x, weight, None, None)
        op.task_linear_grad_weight(g, x, None, tasks)
        for plan in plans:
            op.hyper_linear(x, h, *made, None, "", plan)
            op.hyper_linear(g, h, *made.transposed, None, "", plan)
            op.hyper_linear_backward(g, x, h, *made[:3], None, "", [True] * 3, plan)
            op.hyper_linear_grad_h(g, x, made.matrix, made.vector, None, tasks, plan)
            op.hyper_linear_grad_weight(g, x, h, None, True, plan)

    return run


def nanoseconds():
    """On a processor, by thread; not those of a thread that ended meanwhile."""
    found = {}
    for task in TASKS.iterdir():
        try:
            found[int(task.name)] = int((task / "schedstat").read_text().split()[0])
        except OSError:
            continue
    return found


def share_of_others(call):
    """The time of all other threads while this one spends 0.1 s on calls, as a share of that:
    processor time, of which a busy machine leaves them less, as this one does their work then."""
    call()
    before, me = nanoseconds(), threading.get_native_id()
    end = time.thread_time() + 0.1
    while time.thread_time() < end:
        call()
    spent = {t: n - before.get(t, 0) for t, n in nanoseconds().items()}
    return (sum(spent.values()) - spent[me]) / spent[me]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_as_many_threads_as_torch_was_told(threads):
    threads(2)
    assert share_of_others(calls(*LARGE)) > 0.3
    threads(1)
    assert share_of_others(calls(*LARGE)) < 0.1


def test_small_work_stays_on_the_calling_thread(threads):
    threads(2)
    assert share_of_others(calls(*SMALL, plans=[""])) < 0.1
