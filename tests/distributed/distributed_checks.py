"""What several processes check together: a suite that pytest does not collect.
``test_distributed.py`` launches it.

Every ``check`` runs on all ranks; the first failure ends the process, and with it the group.
"""

import copy
import os
import pickle
import sys
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from hyperfast import HyperMLP, HyperNet, MLPSpec, ShardedTaskBank, TargetNet, TaskBank
from hyperfast.distributed import parallelize
from hyperfast.distributed.folder import MANIFEST
from tests.support.budget import close

SPEC = MLPSpec((9, 17, 5))


def make_model(out=1, **kwargs):
    hyper = HyperNet(
        5,
        4,
        (7, 6),
        out,
        activation="tanh",
        target_activation="tanh",
        dtype=torch.float64,
        **kwargs,
    )
    torch.nn.init.normal_(hyper.head.bias)
    return HyperMLP(hyper)


def part(rows, rank, ranks):
    """A rank's share of ``rows``; shares differ in size, and that of rank 1 of 4 is empty."""
    edges = {1: [0, 1], 2: [0, 0.3, 1], 4: [0, 0.4, 0.4, 0.9, 1]}[ranks]
    return rows[int(edges[rank] * len(rows)) : int(edges[rank + 1] * len(rows))]


def everyones(rows):
    """The rows of all ranks, rank after rank."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows)
    return torch.cat(parts)


# Training


def check_ddp(rank, ranks, folder):
    """Gradients of the mean over shares of a batch are those of the mean over the batch."""
    model = make_model(3)
    z, x = torch.randn(4 * ranks, 5).double(), torch.randn(4 * ranks, 3, 4).double()
    loss = model(x, z).square().mean()
    expected = torch.autograd.grad(loss, list(model.parameters()))
    mine = slice(4 * rank, 4 * rank + 4)
    replica = DistributedDataParallel(model)  # whose hooks end with it
    replica(x[mine], z[mine]).square().mean().backward()
    close([p.grad for p in model.parameters()], list(expected))


def parallel_case(form, bias):
    """A model, and its arguments in one of the forms that it takes."""
    x = {"rows": (3, 4, 4), "single": (3, 4), "ragged": (9, 4), "jagged": (9, 4), "one": (4, 4)}
    x = torch.randn(x[form], dtype=torch.float64, requires_grad=True)
    z = torch.randn((5,) if form == "one" else (3, 5), dtype=torch.float64, requires_grad=True)
    ids = [torch.randint(3, (9,))] if form == "ragged" else []
    return make_model(bias=bias), x, z, ids


def run(model, x, z, ids, form):
    """The output, and gradients of both inputs; those of the parameters are left in them."""
    if form == "jagged":
        y = torch.nested.nested_tensor_from_jagged(x, torch.tensor([0, 2, 7, 9]))
        y = model(y, z).values()
    else:
        y = model(x, z, *ids)
    y.sin().sum().backward()
    grads = x.grad, z.grad
    x.grad = z.grad = None
    return y, *grads


def check_parallelize(rank, ranks, folder):
    """Values and every gradient, for every form of input, with more ranks than outputs."""
    mesh = init_device_mesh("cpu", (ranks,))
    for form in ("rows", "single", "ragged", "jagged", "one"):
        for bias, head_bias in ((True, True), (False, True), (True, False), (False, False)):
            model, x, z, ids = parallel_case(form, bias)
            if not head_bias:
                model.hyper.head.register_parameter("bias", None)
            expected = run(model, x, z, ids, form)
            parallel = parallelize(copy.deepcopy(model), mesh)
            close(run(parallel, x, z, ids, form), expected)
            for p in parallel.parameters():
                assert p.grad.placements == p.placements
                p.data.copy_(p.grad)
            grads = {name: p.grad for name, p in model.named_parameters()}
            close(parallel.full_state_dict(), grads)


def check_parallel_training(rank, ranks, folder):
    """A few steps with clipping; and each rank holds its share of the head and no more."""
    mesh = init_device_mesh("cpu", (ranks,))
    model, x, z, _ = parallel_case("rows", True)
    torch.manual_seed(rank)  # ranks that were initialised differently take over the first's values
    parallel = copy.deepcopy(model) if rank == 0 else make_model()
    parallel = parallelize(parallel, mesh)
    for layer, out in zip(parallel.layers, (7, 6, 1), strict=True):
        share = -(-out // ranks)
        assert len(layer.weight.to_local()) == max(0, min(share, out - rank * share))
    for one in (model, parallel):
        optimizer = torch.optim.Adam(one.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            one(x, z).square().sum().backward()
            torch.nn.utils.clip_grad_norm_(one.parameters(), 0.5)
            optimizer.step()
    trained = make_model()
    trained.load_state_dict(parallel.full_state_dict())
    close(trained.state_dict(), model.state_dict())
    close(trained(x, z), parallel(x, z))


def check_parallelize_refuses(rank, ranks, folder):
    mesh = init_device_mesh("cpu", (ranks,))
    hyper = HyperNet(5, 4, 7, 3)
    for wrong in (hyper, HyperMLP(hyper, TargetNet("elu", weight_transform="abs"))):
        with pytest.raises(TypeError, match="model must be a HyperMLP whose target"):
            parallelize(wrong, mesh)
    with pytest.raises(ValueError, match="mesh must have one dimension, got 2"):
        parallelize(HyperMLP(hyper), init_device_mesh("cpu", (1, ranks)))
    model = parallelize(HyperMLP(hyper), mesh)
    with pytest.raises(ValueError, match="x must have 4 features"):
        model(torch.randn(2, 3), torch.randn(2, 5))
    with pytest.raises(ValueError, match=r"z must have shape \(5,\) or \(B, 5\)"):
        model(torch.randn(2, 4), torch.randn(2, 4))
    with pytest.raises(TypeError, match="x must have the dtype"):
        model(torch.randn(2, 4).double(), torch.randn(2, 5))


# The bank


def batch(rank, tasks, rows=1400):
    """This rank's rows of a batch in which tasks have from none to about 900 rows. Some have more
    than the 6 of a small group only in all ranks together; the shares differ, one may be empty."""
    ids = torch.cat([torch.randint(tasks, (rows // 2,)), torch.full((rows - rows // 2,), 1)])
    ids = ids[torch.randperm(rows)]
    x = torch.randn(rows, 2 * SPEC.sizes[0])[:, ::2]
    return part(x, rank, dist.get_world_size()), part(ids, rank, dist.get_world_size())


def check_one_batch_to_the_last_bit(rank, ranks, folder):
    """What all ranks ask is answered as one bank answers it in one batch."""
    weights = torch.randn(150, SPEC.numel)
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        bank = ShardedTaskBank.from_weights(SPEC, part(weights, rank, ranks), dtype=dtype)
        plain = TaskBank.from_weights(SPEC, weights, dtype=dtype)
        assert len(bank) == 150
        assert 0 < len(bank.local) < 150
        for _ in range(3):
            x, ids = batch(rank, 150)
            y = plain(everyones(x), everyones(ids))
            assert torch.equal(everyones(bank(x, ids)), y)
        assert torch.equal(bank.weights(ids), plain.weights(ids))
    y = bank(x.double(), ids)
    assert y.dtype == torch.float64
    assert bank(x[:0], ids[:0]).shape == (0, 5)


def check_latents(rank, ranks, folder):
    """Weights made of latents by the owners; also with a memory budget."""
    hyper = HyperNet(4, 9, 17, 5)
    z = torch.randn(60, 4)
    plain = TaskBank.from_latents(hyper, z)
    for budget in (None, 20 * 4 * SPEC.numel):
        bank = ShardedTaskBank.from_latents(hyper, part(z, rank, ranks), max_bytes=budget)
        x, ids = batch(rank, 60, 200)
        for _ in range(2):
            close(bank(x, ids), plain(x, ids), 1e-5)
        bank.update([7, 8] if rank == ranks - 1 else [], z[: 2 if rank == ranks - 1 else 0])
        close(bank.weights([7, 8, 9]), plain.weights([0, 1, 9]), 1e-5)
        bank.save(folder / "latents")
        again = ShardedTaskBank.open(folder / "latents", hyper=hyper)
        close(again(x, ids), bank(x, ids), 1e-5)


def check_changes(rank, ranks, folder):
    """Random changes by ranks in turn, beside a dict of what each task should be."""
    draws = torch.Generator().manual_seed(1)  # all ranks draw the same

    def draw(high, count=()):
        return torch.randint(high, count, generator=draws)

    bank = ShardedTaskBank.from_weights(SPEC, torch.empty(0, SPEC.numel))
    known, issued = {}, 0
    for step in range(30):
        mine = step % ranks == rank
        flat = torch.randn(1 + int(draw(5)), SPEC.numel, generator=draws)
        some = [*known][: len(flat)] if step % 2 else [*known][-len(flat) :]
        kind = ("add", "add", "give", "update", "remove")[int(draw(5))] if len(known) > 5 else "add"
        if kind == "add":
            ids = bank.add(weights=flat[: len(flat) * mine])
            some = list(range(issued, issued + len(flat)))
            assert ids.tolist() == some * mine
        elif kind == "give":
            some = [issued + 2 * n for n in range(len(flat))]
            bank.add(weights=flat[: len(flat) * mine], keys=some * mine)
        elif kind == "update":
            bank.update(some * mine, weights=flat[: len(flat) * mine])
        else:
            bank.remove(some * mine)
            known = {task: weight for task, weight in known.items() if task not in some}
        if kind != "remove":
            known |= zip(some, flat, strict=True)
            issued = max(issued, *(task + 1 for task in some))
        assert len(bank) == len(known)
    assert issued > len(known) > 5
    assert torch.equal(bank.weights([*known]), torch.stack([*known.values()]))


def names_of(count):
    return [f"user {n}" for n in range(count)]


def check_names(rank, ranks, folder):
    weights = torch.randn(40, SPEC.numel)
    names = names_of(40)
    bank = ShardedTaskBank.from_weights(
        SPEC, part(weights, rank, ranks), keys=part(names, rank, ranks)
    )
    plain = TaskBank.from_weights(SPEC, weights, keys=names)
    x, ids = batch(rank, 40, 100)
    y = bank(x, [names[n] for n in ids])
    assert torch.equal(everyones(y), plain(everyones(x), everyones(ids)))
    assert torch.equal(bank.weights(names[:3]), weights[:3])
    bank.remove(part(names[:20], rank, ranks))
    assert len(bank) == 20
    assert torch.equal(bank.weights(names[20:]), weights[20:])
    # A name that was removed can come back; a number issued meanwhile is the first.
    assert bank.add(weights=weights[: rank == 0], keys=names[: rank == 0]).tolist() == (
        bank.ids(names[:1]).tolist() if rank == 0 else []
    )
    assert bank.add(weights=weights[: rank == 0]).tolist() == [0] * (rank == 0)


def check_what_is_asked_of_all(rank, ranks, folder):
    """Latents, membership and reports, from whatever rank holds the task."""
    hyper, z = HyperNet(4, 9, 17, 5), torch.randn(40, 4)
    bank = ShardedTaskBank.from_latents(hyper, part(z, rank, ranks), dtype=torch.bfloat16)
    plain = TaskBank.from_latents(hyper, z, dtype=torch.bfloat16)
    ids = torch.randint(40, (7 + rank,))
    assert torch.equal(bank.latents(ids), z[ids])
    assert bank.latents([]).shape == (0, 4)
    assert rank in bank
    assert (40 + rank in bank) is False
    assert "nobody" not in bank
    every, exact = bank.error_report(), plain.error_report()
    for got, want in zip(every.layers, exact.layers, strict=True):
        assert got.layer == want.layer
        # Of all weights the same, but for the rounding of products in batches of other sizes.
        assert abs(got.weight_relative / want.weight_relative - 1) < 0.02
        assert 0.5 < got.output_relative / want.output_relative < 2
    assert all(text == str(every) for text in everyones_objects(str(every)))
    some = bank.ids(list(range(rank, 40, ranks)))
    again = bank.error_report(ids=some, rows=3)
    assert abs(again.layers[0].weight_relative / every.layers[0].weight_relative - 1) < 1e-6
    flat = hyper.spec.flatten(hyper(z)).detach()
    given = bank.error_report(flat[some], ids=some)
    assert abs(given.layers[0].weight_relative / every.layers[0].weight_relative - 1) < 1e-3
    with pytest.raises(ValueError, match="weights must hold"):
        bank.error_report(flat[some][: 1 if rank == 0 else None], ids=some)
    with pytest.raises(ValueError, match="the ranks must all give weights, or none"):
        bank.error_report(flat[some] if rank == 0 else None, ids=some)
    with pytest.raises(ValueError, match="the ranks must all give weights, or none"):
        bank.error_report(ids=some, rows=3 + rank)
    costs = bank.explain()
    assert costs.tasks == len(bank.local)
    assert costs.keep_bytes == 2 * SPEC.numel
    bank.add(weights=torch.randn(1, SPEC.numel), keys=[f"of {rank}"])
    with pytest.raises(ValueError, match="given by latents"):
        bank.latents([f"of {rank}"])
    bank.close()
    assert len(bank.weights([f"of {rank}"])) == 1
    for way in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(TypeError, match="a ShardedTaskBank cannot be copied or pickled"):
            way(bank)
    keys = [numpy.int64(50 + rank)]
    assert bank.add(weights=torch.randn(1, SPEC.numel), keys=keys).tolist() == [50 + rank]
    assert numpy.int64(50 + rank) in bank
    with pytest.raises(TypeError, match="keys must be str or int"):
        bank.weights([True])


def check_another_default_device(rank, ranks, folder):
    """Tensors of the bank and of what ranks tell each other are made where they belong."""
    torch.set_default_device("meta")
    generator = torch.Generator("cpu").manual_seed(0)
    weights = torch.randn(20, SPEC.numel, generator=generator, device="cpu")
    try:
        bank = ShardedTaskBank.from_weights(SPEC, part(weights, rank, ranks), dtype=torch.int8)
        bank.add(weights=weights[:2], keys=[f"{rank}.{n}" for n in range(2)])
        bank.update([rank], weights=weights[:1])
        bank.remove([10 + rank])
        path = folder / "elsewhere"
        bank.save(path)
        names = [f"{rank}.0", ranks]
        for one in (bank, ShardedTaskBank.open(path, verify=True)):
            assert one.weights(names).device.type == "cpu"
            assert one(weights[:2, :9], names).shape == (2, 5)
            assert f"{rank}.1" in one
            exact = weights[[0, ranks]]
            assert one.error_report(exact, ids=names).layers[0].weight_relative < 0.01
            with pytest.raises(IndexError):
                one.weights([10 + rank])
        if ranks == 2:
            group = [dist.new_group([n]) for n in range(ranks)][rank]
            alone = ShardedTaskBank.open(path, group=group)
            assert len(alone) == len(bank)
    finally:
        torch.set_default_device(None)


def everyones_objects(value):
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def check_an_error_is_everyones(rank, ranks, folder):
    """One rank's mistake raises on all ranks, and leaves the bank as it was."""
    weights = torch.randn(30, SPEC.numel)
    bank = ShardedTaskBank.from_weights(SPEC, part(weights, rank, ranks))
    last, x, ids = rank == ranks - 1, torch.randn(4, 9), torch.arange(4)
    none = slice(0, 4 * last)  # of a change, the last rank's part is all

    @contextmanager
    def raises(kind, match):
        with pytest.raises(kind, match=match) as caught:
            yield
        assert type(caught.value) is kind
        assert len(bank) == 30
        assert torch.equal(bank.weights(torch.arange(30)), weights)

    with raises(IndexError, "no task of the bank has the id 77"):
        bank(x, ids + 74 * last * (ids == 3))
    with raises(ValueError, "x must have shape"):
        bank(x[:, : 8 + (not last)], ids)
    with raises(TypeError, "x must be a floating-point tensor"):
        bank(x.long() if last else x, ids)
    with raises(TypeError, "x must be a Tensor"):
        bank(None if last else x, ids)
    with raises(TypeError, "ids must be int64"):
        bank(x, ids.float() if last else ids)
    with raises(TypeError, "keys must be str or int"):
        bank(x, [0, 1, 2, 1.5] if last else ids)
    with raises(IndexError, "no task of the bank has the id 30"):
        bank.weights([30 * last])
    with raises(ValueError, "the id 3 is taken"):
        bank.add(weights=weights[none], keys=[40, 41, 3, 42][none])
    with raises(ValueError, "40 comes twice"):
        bank.add(weights=weights[:1], keys=[40])
    with raises(ValueError, "weights must have shape"):
        bank.add(weights=weights[:2, :5] if last else weights[:2])
    with raises(ValueError, "all give z, or all give weights|z needs a hypernetwork"):
        bank.add(torch.randn(1, 4)) if last else bank.add(weights=weights[:1])
    with raises(ValueError, r"keys must be in \[0, 2\*\*63\), got -1"):
        bank.add(weights=weights[:1], keys=torch.tensor([-1 if last else 50 + rank]))
    with raises(ValueError, "3 comes twice"):
        bank.update([3], weights=weights[:1])
    with raises(IndexError, "no task of the bank has the id 99"):
        bank.update([1, 2, 99, 3][none], weights=weights[none])
    with raises(IndexError, "no task of the bank has the id 99"):
        bank.remove([1, 2, 99, 3][none])
    with raises(ValueError, "5 comes twice"):
        bank.remove([5])
    with pytest.raises(TypeError, match="hyper must be a HyperNet"):
        ShardedTaskBank.from_latents(None if last else HyperNet(4, 9, 17, 5), torch.randn(3, 4))
    with pytest.raises(ValueError, match="the ranks must give banks of equal sizes"):
        ShardedTaskBank.from_weights(
            SPEC, weights, dtype=torch.float32 if last else torch.bfloat16, keys=[rank] * 30
        )
    # What a rank had stored before another one failed has been given back.
    store, rows = bank.local.contents.table.weights, bank.local.contents.table.weights.slots
    assert len(store.reserve(rows - len(bank.local)).unique()) == rows - len(bank.local)
    assert store.slots == rows


# Files


def check_reshard(rank, ranks, folder):
    """Saved by any number of ranks, opened by any other, to the last bit."""
    groups = {n: dist.new_group(range(n)) for n in (1, 2, 4) if n <= ranks}
    hyper = HyperNet(4, 9, 17, 5)
    for dtype in (torch.float32, torch.int8):
        bank = ShardedTaskBank.from_latents(
            hyper, part(torch.randn(40, 4), rank, ranks), dtype=dtype
        )
        extra = torch.randn(3, SPEC.numel)
        last = rank == ranks - 1
        bank.add(weights=extra[: 3 * last], keys=["a", "b", "c"][: 3 * last])
        bank.remove([39] if rank == 0 else [])
        ids = torch.cat([torch.arange(39), bank.ids(["a", "b", "c"])])
        weights = bank.weights(ids)
        path = folder / f"{dtype}"
        bank.save(path)
        for before in groups:
            for after, group in groups.items():
                if rank < after:
                    again = ShardedTaskBank.open(path, group=group, verify=True)
                    assert len(again) == 42
                    assert torch.equal(again.weights(ids), weights)
                    # A number that was removed is not issued again.
                    new = again.add(weights=extra[: rank == 0])
                    assert new.tolist() == [40] * (rank == 0)
                dist.barrier()
            if rank < before:
                ShardedTaskBank.open(path, group=groups[before], hyper=hyper).save(path)
            dist.barrier()
            assert len([*path.glob("*.safetensors")]) == before
        again = ShardedTaskBank.open(path, hyper=hyper)
        again.update([0] if rank == 0 else [], torch.zeros(int(rank == 0), 4))
        close(
            again.weights([0]),
            TaskBank.from_latents(hyper, torch.zeros(1, 4), dtype=dtype).weights([0]),
            1e-5,
        )


def check_modes(rank, ranks, folder):
    """Files that follow others are as open to others as these; the first are the umask's."""
    path = folder / "modes"
    bank = ShardedTaskBank.from_weights(SPEC, torch.zeros(9 * (rank == 0), SPEC.numel))
    bank.save(path)
    dist.barrier()
    if rank == 0:
        for file in path.iterdir():
            file.chmod(0o600)
    dist.barrier()
    bank.save(path)
    dist.barrier()
    assert len([*path.iterdir()]) == ranks + 2
    for file in path.iterdir():
        assert file.stat().st_mode & 0o777 == 0o600


def check_few_tasks(rank, ranks, folder):
    """Some ranks own none."""
    weights = torch.randn(1, SPEC.numel)
    bank = ShardedTaskBank.from_weights(SPEC, weights[: rank == 0])
    bank.save(folder / "few")
    for one in (bank, ShardedTaskBank.open(folder / "few")):
        x = torch.randn(3, 9)
        y = TaskBank.from_weights(SPEC, weights)(everyones(x), torch.zeros(3 * ranks).long())
        assert torch.equal(everyones(one(x, [0, 0, 0])), y)
        one.remove([0] if rank == 0 else [])
        assert len(one) == 0


def check_a_failed_save(rank, ranks, folder):
    """Wherever a rank fails, all raise, and the folder holds the old set or the new one."""
    path = folder / "failing"
    old, new = torch.zeros(8, SPEC.numel), torch.ones(8, SPEC.numel)
    ids, first = torch.arange(8), slice(0, 8 * (rank == 0))
    bank = ShardedTaskBank.from_weights(SPEC, old[first])
    bank.save(path)
    bank.update(ids[first], weights=new[first])
    steps = []

    def failing(call):
        def step(*args):
            steps.append(call)
            if len(steps) == fails:
                raise OSError("the disk is full")
            return call(*args)

        return step

    # A file is synced, renamed, and synced in its folder: a rank's bank, then rank 0's manifest.
    for culprit, n in [*((0, n) for n in range(1, 7)), *((ranks - 1, n) for n in range(1, 4))]:
        fails = n if rank == culprit else 0
        with pytest.MonkeyPatch.context() as patch:
            for call in (os.fsync, os.replace):
                patch.setattr(os, call.__name__, failing(call))
            with pytest.raises(OSError, match="the disk is full"):
                bank.save(path)
        steps.clear()
        weights = ShardedTaskBank.open(path, verify=True).weights(ids)
        # Only what failed after the manifest had its name is there.
        assert torch.equal(weights, new if culprit == 0 and n == 6 else old)
        dist.barrier()
        assert len([*path.glob("*.safetensors*")]) == ranks
        if culprit == 0 and n == 6:
            old = new
        dist.barrier()
    # What a crash leaves is not opened, and removed by the next save.
    left = [path / f"{MANIFEST}.tmp", path / f"{0:016x}.0-of-2.safetensors"]
    if rank == 0:
        for file in left:
            file.write_bytes(b"torn")
    dist.barrier()
    assert torch.equal(ShardedTaskBank.open(path).weights(ids), new)
    bank.save(path)
    dist.barrier()
    assert not any(file.exists() for file in left)


def check_bad_folders(rank, ranks, folder):
    with pytest.raises(ValueError, match="is not a sharded bank: it has no manifest"):
        ShardedTaskBank.open(folder / "nothing")
    mine = folder / f"of rank {rank}"
    group = [dist.new_group([n]) for n in range(ranks)][rank]
    ShardedTaskBank.from_weights(SPEC, torch.zeros(2 + rank, SPEC.numel), group=group).save(mine)
    with pytest.raises(ValueError, match="does not hold the same on all ranks"):
        ShardedTaskBank.open(mine)
    path = folder / "one lost"
    bank = ShardedTaskBank.from_weights(SPEC, torch.zeros(9 * (rank == 0), SPEC.numel))
    bank.save(path)
    if rank == 0:
        next(path.glob(f"*{ranks - 1}-of-*")).unlink()
    dist.barrier()
    with pytest.raises(FileNotFoundError if rank == ranks - 1 else (OSError, RuntimeError)):
        ShardedTaskBank.open(path)


CHECKS = {name[6:]: check for name, check in globals().items() if name.startswith("check_")}


def main(folder, **where):
    """Runs all checks; rank 0 writes down each that has passed on all ranks."""
    torch.set_num_threads(1)
    # Longer than a loaded machine stands still: one that fails closes its connections at once.
    dist.init_process_group("gloo", timeout=timedelta(minutes=10), **where)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for name, check in CHECKS.items():
        torch.manual_seed(0)
        check(rank, ranks, Path(folder))
        dist.barrier()
        if rank == 0:
            with open(Path(folder) / "passed", "a") as passed:
                passed.write(f"{name}\n")
    dist.destroy_process_group()


def spawned(rank, ranks, folder):
    main(folder, init_method=f"file://{folder}/store", rank=rank, world_size=ranks)


if __name__ == "__main__":
    main(sys.argv[1])
