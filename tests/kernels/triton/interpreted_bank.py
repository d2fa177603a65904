"""Banks and stored networks as a GPU runs them, on CPU tensors by Triton's interpreter: ids looked
up by a kernel, rows of a task in stretches, sums in parts. As
``interpreted_layers.py``, a suite that pytest does not collect by itself."""

import copy
import gc
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hyperfast
from hyperfast import HyperNet, MLPSpec, TargetNet, TaskBank
from hyperfast.bank import deferred, rows
from hyperfast.bank.contents import Given
from hyperfast.kernels import triton as kernels
from hyperfast.kernels.triton import grouped, launch, look_up
from hyperfast.layout import Network
from hyperfast.plans import gpu
from tests.support.budget import close
from tests.support.interpreted import on_triton_kernels
from tests.support.networks import apply_stored, text

FP64 = torch.float64
SPEC = MLPSpec((5, 7, 3))
TASKS = 40


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch, nan_poison):
    """Banks look their ids up in a kernel, and ops run on Triton kernels, whose programs count."""
    monkeypatch.setattr(deferred, "answers_later", lambda device: True)
    with on_triton_kernels(monkeypatch) as count:
        yield count


def make(tasks=TASKS, dtype=FP64, **options):
    flat = torch.randn(tasks, SPEC.numel, dtype=FP64)
    return TaskBank.from_weights(SPEC, flat, dtype=dtype, **options)


def ask(tasks=TASKS, count=17):
    return torch.randn(count, SPEC.sizes[0], dtype=FP64), torch.randint(tasks, (count,))


def right(bank, x, ids):
    weights = bank.spec.split(bank.weights(ids).double())
    return TargetNet()(x.double().unsqueeze(1), weights).squeeze(1)


# What a row reads


READS = {
    "_local_scalar_dense", "item", "nonzero", "unique", "_unique2", "unique_dim", "equal",
    "unique_consecutive", "masked_select", "is_nonzero", "repeat_interleave", "_to_copy",
    "lift_fresh",
}  # fmt: skip


class NoReads(TorchDispatchMode):
    """Every op below, within ours too; one that brings values to the host, or whose result has a
    size that depends on them, raises."""

    watching = False

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __enter__(self):
        NoReads.watching = True
        return super().__enter__()

    def __exit__(self, *raised):
        NoReads.watching = False
        return super().__exit__(*raised)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.seen[name] += 1
        assert name not in READS, f"the host reads the device by {name}"
        if name == "index":  # by a mask it is a nonzero, and an index
            assert all(i is None or i.dtype != torch.bool for i in args[1])
        if func.namespace == "hyperfast":
            with self:
                y = getattr(kernels, name)(*args, **(kwargs or {}))
            NoReads.watching = True
            return y
        return func(*args, **(kwargs or {}))


@pytest.fixture
def reads(monkeypatch):
    # What stands in the interpreter for the assertion of a device.
    monkeypatch.setattr(launch.checks, "check_in_range", lambda *_: None)
    for name in ("tolist", "cpu", "numpy"):  # of which a mode sees nothing
        monkeypatch.setattr(torch.Tensor, name, watched(name))
    return NoReads()


def watched(name):
    read = getattr(torch.Tensor, name)

    def watched(t):
        assert not NoReads.watching, f"the host reads the device by {name}"
        return read(t)

    return watched


def test_the_watch_sees_what_reads(reads):
    for read in (
        lambda t: t.max().item(),
        lambda t: t.tolist(),
        lambda t: t.cpu(),
        lambda t: t.numpy(),
        lambda t: bool(t.all()),
        lambda t: t[t > 1],
        lambda t: t.nonzero(),
        lambda t: t.unique(),
        lambda t: t.to(torch.float16, copy=True),
    ):
        with pytest.raises(AssertionError), reads:
            read(torch.arange(3))


@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("dtype", [FP64, torch.int8])
def test_a_call_reads_nothing(dtype, whole, sort, reads, monkeypatch):
    """In order and looked up, of networks in one kernel and by layers, sorted or not."""
    monkeypatch.setattr(gpu, "fits_one_kernel", lambda sizes: whole)
    monkeypatch.setattr(gpu, "sorting_pays", lambda bytes: sort)
    bank = make(dtype=dtype)
    x, ids = ask()
    x = x.to(bank.contents.format.compute)
    for change in (lambda: None, lambda: bank.update([3], weights=torch.randn(1, SPEC.numel))):
        change()
        with reads:
            y = bank(x, ids)
        close(y.double(), right(bank, x, ids), 1e-9 if dtype == FP64 else 1e-5)
    assert reads.seen["task_mlp"] == 2
    assert bool(reads.seen["sort"]) == sort


def test_an_activation_of_ones_own_reads_nothing(reads):
    flat = torch.randn(TASKS, SPEC.numel, dtype=FP64)
    own = TaskBank.from_weights(SPEC, flat, target=TargetNet(torch.nn.PReLU(dtype=FP64)))
    x, ids = ask()
    with reads:
        y = own(x, ids)
    want = TargetNet(torch.nn.PReLU(dtype=FP64))(x.unsqueeze(1), SPEC.split(flat[ids]))
    close(y, want.squeeze(1).detach())
    assert reads.seen["task_linear"] == 2


# What it answers


@pytest.mark.parametrize("count", [0, 1, 3, 63, 1025])
def test_equals_the_right_answer(count):
    bank = make()
    x, ids = ask(count=count)
    y = bank(x, ids)
    assert y.shape == (count, 3)
    if count:
        close(y, right(bank, x, ids))
    bank.check()


def test_strides_of_ids():
    bank = make()
    x, ids = ask()
    y = bank(x, ids)
    assert torch.equal(bank(x, torch.stack([ids, ids], 1)[:, 0]), y)
    same = bank(x[:1].expand(9, 5), ids[:1].expand(9))
    close(same, y[:1].expand(9, 3))


def test_every_change_is_seen():
    bank = make()
    x, _ = ask()

    def agree():
        ids = bank.ids()
        rows = x[torch.randint(len(x), (len(ids),))]
        close(bank(rows, ids), right(bank, rows, ids))
        bank.check()

    agree()
    bank.update([3, 39], weights=torch.randn(2, SPEC.numel))
    agree()
    bank.remove([0, 7])
    agree()
    assert bank.add(weights=torch.randn(3, SPEC.numel)).max() >= 1 << 32
    agree()
    bank.add(weights=torch.randn(500, SPEC.numel))
    agree()


@pytest.mark.parametrize("bad", [-1, -(1 << 63), TASKS, 1 << 32, (1 << 63) - 1, (7 << 32) + 3, 5])
def test_an_id_that_is_not_there(bad):
    """Its rows are NaN, and the next call raises, or the next check; the others are as they are."""
    bank = make()
    bank.remove([5])
    x, ids = ask()
    ids[ids == 5] = 6
    clean = bank(x, ids)
    ids[4] = bad
    for hear in (bank.check, lambda: bank(x, ids)):
        y = bank(x, ids)
        assert y[4].isnan().all()
        others = torch.arange(len(x)) != 4
        assert torch.equal(y[others], clean[others])
        told = min(bad, look_up.NOBODY - 1)
        with pytest.raises(IndexError, match=f"has the id {told}, of an earlier call"):
            hear()
    bank.check()


def test_a_bank_without_tasks_raises_at_once():
    bank = TaskBank.from_weights(SPEC, torch.randn(0, SPEC.numel))
    with pytest.raises(IndexError, match="no task of the bank has the id 3"):
        bank(torch.randn(1, 5), torch.tensor([3]))


def test_growth_keeps_one_segment(monkeypatch):
    monkeypatch.setattr(rows, "MERGE", 0)
    bank = make()
    for _ in range(5):
        bank.add(weights=torch.randn(100, SPEC.numel))
    assert len(bank.contents.table.weights.segments) == 1
    x, ids = ask(len(bank), 600)
    close(bank(x, ids), right(bank, x, ids))


def test_growth_without_the_memory_to_copy(monkeypatch):
    """A segment of its own: the host looks ids up, and raises at once."""
    bank = make()
    empty = rows.Store._empty

    def short(store, slots):
        if slots > 150:
            raise torch.OutOfMemoryError("short")
        return empty(store, slots)

    monkeypatch.setattr(rows.Store, "_empty", short)
    bank.add(weights=torch.randn(150, SPEC.numel))
    assert len(bank.contents.table.weights.segments) == 2
    x, ids = ask(len(bank), 300)
    close(bank(x, ids), right(bank, x, ids))
    with pytest.raises(IndexError, match=r"no task of the bank has the id 190$"):
        bank(x[:1], torch.tensor([190]))


def test_a_budget_reads_on_the_host():
    hyper = HyperNet(4, 5, (7,), 3, hidden=6)
    bank = TaskBank.from_latents(hyper, torch.randn(9, 4), max_bytes=1000)
    assert bank.contents.table.deferred is None
    with pytest.raises(IndexError, match=r"no task of the bank has the id 9$"):
        bank(torch.randn(1, 5), torch.tensor([9]))
    bank.check()


# Graphs: the arguments of a look-up stay those that it was captured with.


def captured(bank, monkeypatch):
    """What replays a call's look-up: slots, and which ids are missing."""
    given = []
    find = look_up.look_up

    def recording(*args):
        given.append(args)
        return find(*args)

    on = bank.contents.table.deferred
    monkeypatch.setattr(on, "_look_up", recording)
    monkeypatch.setattr(launch, "capturing", lambda device: device == bank.device)
    x, ids = ask(len(bank), 8)
    bank(x, ids)
    monkeypatch.setattr(launch, "capturing", lambda device: False)
    ((_, codes, end, fault),) = given
    columns = bank.contents.table.weights.segments[0].columns

    def replay(ids):
        slots, missing = find(ids, codes, end, fault)
        return columns[0][slots], missing

    return replay


@pytest.mark.parametrize("made", [make, lambda tasks: copy.deepcopy(make(tasks))])
def test_a_graph_sees_changes(made, monkeypatch):
    """There is room for them: nothing moves, and what is given back is used again."""
    bank = made(500)
    store = bank.contents.table.weights
    replay, columns = captured(bank, monkeypatch), store.segments[0].columns
    for _ in range(70):
        bank.update([3], weights=torch.randn(1, SPEC.numel))
    bank.update(range(60), weights=torch.randn(60, SPEC.numel))
    assert store.segments[0].columns is columns
    bank.remove([4])
    assert torch.equal(replay(torch.tensor([3]))[0], bank.weights([3]))
    assert replay(torch.tensor([3, 4]))[1].tolist() == [False, True]
    new = bank.add(weights=torch.randn(1, SPEC.numel))
    weights, missing = replay(new)
    assert not missing.any()
    assert torch.equal(weights, bank.weights(new))


@pytest.mark.parametrize("grow", ["slots", "table"])
def test_a_graph_of_memory_that_was_left_finds_nobody(grow, monkeypatch):
    """Larger columns with the same table, or both."""
    bank = make()
    replay = captured(bank, monkeypatch)
    table = bank.contents.table
    codes, columns = table._codes, table.weights.segments[0].columns
    if grow == "slots":  # all 104 are taken, and those given back are not free yet
        with table.lock:
            reader = table.weights.enter()
        for _ in range(70):
            bank.update([3], weights=torch.randn(1, SPEC.numel))
        with table.lock:
            table.weights.leave(reader)
    else:
        bank.add(weights=torch.randn(100, SPEC.numel))
    assert table._codes is not codes
    assert table.weights.segments[0].columns is not columns
    assert replay(torch.arange(TASKS))[1].all()
    with pytest.raises(IndexError, match="of an earlier call, or the bank grew after a graph was"):
        bank.check()
    x, ids = ask()
    close(bank(x, ids), right(bank, x, ids))
    bank.check()


def test_a_graph_captured_after_a_growth_that_was_given_up(monkeypatch):
    """An addition that fails has moved the bank: what is captured then goes on, what was captured
    before finds nobody, and both find their memory."""
    bank = make()
    before, table = captured(bank, monkeypatch), bank.contents.table

    def blocks():
        raise torch.OutOfMemoryError("short")
        yield

    with pytest.raises(torch.OutOfMemoryError), bank.contents.adding(Given(70, None, blocks())):
        pass
    assert before(torch.arange(TASKS))[1].all()
    with pytest.raises(IndexError, match="the bank grew after a graph was captured"):
        bank.check()
    columns = table.weights.segments[0].columns
    after = captured(bank, monkeypatch)
    bank.update([3], weights=torch.randn(1, SPEC.numel))
    weights, missing = after(torch.arange(TASKS))
    assert not missing.any()
    assert torch.equal(weights, bank.weights(bank.ids()))
    bank.add(weights=torch.randn(500, SPEC.numel))
    assert after(torch.arange(TASKS))[1].all()
    kept = table.deferred._captured + table.deferred._left
    assert any(of is columns for _, of in kept)


def test_what_was_not_captured_is_not_kept():
    bank = make()
    bank(*ask())
    assert not bank.contents.table.deferred._captured


def test_a_server_tells_who_asked():
    bank = make(dtype=torch.float32)
    bank.remove([5])
    with hyperfast.server.TaskServer(bank, max_delay=0.2) as server:
        good, bad = (server.submit(task, torch.ones(5)) for task in (4, 5))
        assert good.result().isfinite().all()
        with pytest.raises(IndexError, match="no task of the bank has the id 5"):
            bad.result()
        assert server.submit(4, torch.ones(5)).result().isfinite().all()


def test_a_server_tells_nobody_what_another_asked(monkeypatch):
    """An id that a caller beside the server missed is not its requests'; of one that is not there
    each of them hears."""
    bank = make(dtype=torch.float32)
    with hyperfast.server.TaskServer(bank, max_delay=0.0) as server:
        bank(torch.ones(1, 5), torch.tensor([77]))
        assert server.submit(4, torch.ones(5)).result().isfinite().all()
        with pytest.raises(IndexError, match="no task of the bank has the id 77"):
            server.submit(77, torch.ones(5)).result()
        assert server.stats().calls == 3  # who is there is asked twice, but no more
        bank.remove([5])
        run = bank.contents.run

        def missing(x, ids):
            run(x[:1], torch.tensor([5]))  # before each of its calls
            return run(x, ids)

        monkeypatch.setattr(bank.contents, "run", missing)
        with pytest.raises(IndexError, match="has the id 5, of an earlier call"):
            server.submit(4, torch.ones(5)).result()
        assert server.stats().calls == 5


def test_the_word_of_a_bank_is_given_to_no_other():
    """A kernel that is on its way may still write it."""
    words = deferred.Words(pinned=False)
    found = {words.new().data_ptr() for _ in range(1000)}
    assert len(found) == 1000
    banks = [make() for _ in range(2)]
    first, second = (bank.contents.table.deferred for bank in banks)
    banks[0](torch.ones(1, 5, dtype=FP64), torch.tensor([77]))
    banks[1].check()
    late, told = first._fault, second._fault
    assert late.data_ptr() != told.data_ptr()
    address = late.data_ptr()
    del banks, first, late
    gc.collect()
    assert all(make().contents.table.deferred._fault.data_ptr() != address for _ in range(600))


def test_a_fork_reads_no_word_of_its_parents():
    """What is pinned is not in a child."""
    bank = make()
    bank(torch.ones(1, 5, dtype=FP64), torch.tensor([77]))
    before = bank.contents.table.deferred._fault
    bank.contents.table.after_fork()
    bank.check()
    after = bank.contents.table.deferred._fault
    assert after.data_ptr() != before.data_ptr()
    bank(torch.ones(1, 5, dtype=FP64), torch.tensor([78]))
    with pytest.raises(IndexError, match="has the id 78"):
        bank.check()


# Rows of one task in stretches

PATTERNS = {
    "distinct": lambda rows: torch.randperm(rows),
    "uniform": lambda rows: torch.randint(rows, (rows,)),
    "skewed": lambda rows: (torch.rand(rows).pow(-2) - 1).long().clamp(max=rows - 1),
    "identical": lambda rows: torch.full((rows,), rows - 1),
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("rows", [1, 33, 100])
def test_any_popularity(rows, whole, sort, pattern, monkeypatch, on_a_gpu):
    monkeypatch.setattr(gpu, "fits_one_kernel", lambda sizes: whole)
    monkeypatch.setattr(gpu, "sorting_pays", lambda bytes: sort)
    ids, net = PATTERNS[pattern](rows), "3 > 6 tanh, 4 b exp(W)"
    x = torch.randn(rows, 3, dtype=FP64)
    weight = torch.randn(rows, Network.parse(net).numel, dtype=FP64)
    y = torch.ops.hyperfast.task_mlp(x, weight, None, ids, net)
    close(y, apply_stored(x, weight, ids, net))
    name = "_task_mlp" if whole else "_task_linear"
    assert on_a_gpu[name] == (1 if whole else 2) * rows


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 15, 70])
def test_rows_that_share_a_task(rows, batched, monkeypatch):
    """Products of several rows at once, over stretches of one task, of 70 rows in three."""
    monkeypatch.setitem(grouped.TASK, "fp64", grouped.Config(16, 32, 16, 4, 2))
    monkeypatch.setattr(grouped, "by_library", lambda *_: False)
    net = text((5, 20, 3), "silu")
    weight = torch.randn(3, Network.parse(net).numel, dtype=FP64)
    lead = (3, rows) if batched else (3 * rows,)
    x, ids = torch.randn(*lead, 5, dtype=FP64), None if batched else torch.randint(2, lead)
    for whole in (False, True):
        monkeypatch.setattr(gpu, "fits_one_kernel", lambda sizes, whole=whole: whole)
        y = torch.ops.hyperfast.task_mlp(x, weight, None, ids, net)
        close(y, apply_stored(x, weight, ids, net))


@pytest.mark.parametrize("activation", ["tanh", "sin"])
def test_a_row_is_the_same_in_any_company(activation, monkeypatch):
    """Sorted or not, alone in its stretch or not."""
    net = text((5, 9, 3), activation)
    weight = torch.randn(6, Network.parse(net).numel, dtype=FP64)
    x, ids = torch.randn(5, 5, dtype=FP64), torch.tensor([2, 0, 2, 2, 5])
    found = []
    for sort in (False, True):
        monkeypatch.setattr(gpu, "sorting_pays", lambda bytes, sort=sort: sort)
        found.append(torch.ops.hyperfast.task_mlp(x, weight, None, ids, net))
        found.append(
            torch.ops.hyperfast.task_mlp(x.flip(0), weight, None, ids.flip(0), net).flip(0)
        )
    assert all(torch.equal(found[0], other) for other in found)


def test_where_sorting_pays():
    """Not for 8,192 rows of 64-64-10 in bf16, but for 65,536, whoever asks for whom."""
    task = 2 * MLPSpec((64, 64, 10)).numel
    assert not gpu.sorting_pays(8192 * task)
    assert gpu.sorting_pays(65536 * task)


# Sums in parts


@pytest.mark.parametrize("width", [1, 20])
@pytest.mark.parametrize("part", [4, 1024])
@pytest.mark.parametrize("pattern", [*PATTERNS, "two"])
def test_sums_of_parts(pattern, part, width, monkeypatch, on_a_gpu):
    """Parts within a task, across two, and tasks within a part; of one input, and of more."""
    monkeypatch.setattr(grouped, "PART", part)
    rows = 90
    ids = torch.arange(rows).ge(13).long() if pattern == "two" else PATTERNS[pattern](rows)
    tasks = 2 if pattern == "two" else rows
    grad, x = (torch.randn(rows, n, dtype=FP64) for n in (17, width))
    y = torch.ops.hyperfast.task_linear_grad_weight(grad, x, ids, tasks)
    want = torch.zeros(tasks, 17, width, dtype=FP64)
    close(y, want.index_add_(0, ids, grad.unsqueeze(2) * x.unsqueeze(1)))
    assert torch.equal(torch.ops.hyperfast.task_linear_grad_weight(grad, x, ids, tasks), y)
    assert bool(on_a_gpu["_task_parts"]) == (part < rows)


@pytest.mark.parametrize("batched", [False, True])
def test_sums_of_rows(batched, monkeypatch):
    monkeypatch.setattr(grouped, "PART", 16)
    each = torch.randn(60, 5, dtype=FP64)
    ids = torch.arange(3).repeat_interleave(20)
    keys = None if batched else ids.int()
    found = grouped.sums(each, launch.Rows(3, 60, 20 if batched else 1, keys))
    close(found, each.view(3, 20, 5).sum(1))
