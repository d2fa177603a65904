"""TaskBank in memory: values against the target network, ids, keys, budget, reports."""

import numpy
import pytest
import torch

from hyperfast import HyperNet, MLPSpec, TargetNet, TaskBank, use_backend

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def make_hyper(seed=0, sizes=(5, (7,), 3), dtype=torch.float32, **kwargs):
    torch.manual_seed(seed)
    return HyperNet(4, *sizes, hidden=6, dtype=dtype, **kwargs)


def rows_of(tasks, count, width, seed=1):
    torch.manual_seed(seed)
    return torch.randn(count, width), torch.randint(tasks, (count,))


def exact(bank, x, ids, target=None):
    """What the stored weights make of ``x``, in float64."""
    weights = bank.spec.split(bank.weights(ids).double())
    return (target or TargetNet())(x.double().unsqueeze(1), weights).squeeze(1)


@pytest.mark.parametrize("rows", [1, 3, 63])
@pytest.mark.parametrize("sizes", [(5, (7,), 3), (1, (1,), 1), (3, (), 63), (63, (3, 3), 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_target(rows, sizes, bias):
    hyper = make_hyper(sizes=sizes, bias=bias, dtype=torch.float64)
    z = torch.randn(9, 4, dtype=torch.float64)
    bank = TaskBank.from_latents(hyper, z)
    x, ids = rows_of(9, rows, sizes[0])
    x = x.double()
    torch.testing.assert_close(
        bank(x, ids), TargetNet()(x, hyper(z), ids).detach(), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("dtype", FLOATS)
def test_rounds_only_as_its_dtype(dtype):
    bank = TaskBank.from_latents(make_hyper(sizes=(63, (63,), 3)), torch.randn(20, 4), dtype=dtype)
    x, ids = rows_of(20, 63, 63)
    y = bank(x, ids)
    assert y.dtype == x.dtype
    # Input, hidden and output are rounded once each, sums of 64 terms to float32 at worst.
    unit = torch.finfo(dtype).eps / 2
    weights = bank.spec.split(bank.weights(ids).double().abs())
    size = TargetNet()(x.double().abs().unsqueeze(1), weights).squeeze(1)
    bound = size * (4 * unit + 130 * torch.finfo(torch.float32).eps / 2)
    assert bool(((y.double() - exact(bank, x, ids)).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_int8_is_within_half_a_step_of_every_weight(dtype):
    spec = MLPSpec((5, 7, 3))
    flat = torch.randn(6, spec.numel).to(dtype)
    flat[2] = 0
    flat[3, : 5 * 7] *= 1e-3
    bank = TaskBank.from_weights(spec, flat, dtype=torch.int8)
    stored = bank.weights(bank.ids())
    for got, want in zip(spec.split(stored), spec.split(flat.double()), strict=True):
        if want.ndim == 2:
            torch.testing.assert_close(got.double(), want, rtol=1e-7, atol=0)
        else:
            step = want.abs().amax(-1, keepdim=True) / 127
            assert bool(((got - want).abs() <= step * 0.50001).all())
    x, ids = rows_of(6, 63, 5)
    torch.testing.assert_close(bank(x, ids).double(), exact(bank, x, ids), rtol=1e-5, atol=1e-5)


def test_int8_widens_in_blocks(monkeypatch):
    monkeypatch.setattr("hyperfast.bank.formats.BLOCK", 200)
    spec = MLPSpec((5, 7, 3))
    bank = TaskBank.from_weights(spec, torch.randn(50, spec.numel), dtype=torch.int8)
    x, ids = rows_of(50, 200, 5)
    torch.testing.assert_close(bank(x, ids).double(), exact(bank, x, ids), rtol=1e-5, atol=1e-5)


def test_any_strides_and_no_rows():
    bank = TaskBank.from_latents(make_hyper(), torch.randn(9, 4))
    x, ids = rows_of(9, 8, 5)
    y = bank(x, ids)
    assert torch.equal(bank(x.mT.contiguous().mT, ids), y)
    assert torch.equal(bank(x, torch.stack([ids, ids], 1)[:, 0]), y)
    same = bank(x[:1].expand(8, 5), ids[:1].expand(8))
    torch.testing.assert_close(same, y[:1].expand(8, 3))
    assert bank(x[:0], ids[:0]).shape == (0, 3)
    assert bank.weights([]).shape == (0, bank.spec.numel)


def test_same_on_reference_backend():
    bank = TaskBank.from_latents(make_hyper(), torch.randn(9, 4))
    x, ids = rows_of(9, 63, 5)
    with use_backend("reference"):
        want = bank(x, ids)
    torch.testing.assert_close(bank(x, ids), want)


def test_no_autocast_and_no_gradient():
    bank = TaskBank.from_latents(make_hyper(), torch.randn(9, 4))
    x, ids = rows_of(9, 63, 5)
    want = bank(x, ids)
    with torch.autocast("cpu"):
        got = bank(x.requires_grad_(), ids)
    assert torch.equal(got, want)
    assert not got.requires_grad


def test_in_and_out_of_inference_mode(tmp_path):
    hyper, z = make_hyper(), torch.randn(9, 4)
    full = TaskBank.from_latents(hyper, z)
    for kwargs in ({}, {"max_bytes": 1000}):
        with torch.inference_mode():
            bank = TaskBank.from_latents(hyper, z, **kwargs)
            bank.add(z + 0)
            bank(torch.randn(9, 5), torch.arange(9) + 0)
            bank.save(tmp_path / "b")
            opened = TaskBank.open(tmp_path / "b", hyper=hyper)
        for some in (bank, opened):
            some.add(z)
            some.update([1], z[:1])
            some.remove([0])
            torch.testing.assert_close(some.weights([1]), full.weights([0]))
            some(torch.randn(2, 5), torch.tensor([1, 20]))


def test_from_weights_takes_what_a_hypernetwork_returns():
    hyper, z = make_hyper(), torch.randn(9, 4)
    x, ids = rows_of(9, 63, 5)
    target = TargetNet("tanh")
    bank = TaskBank.from_weights(hyper.spec, hyper(z), target=target)
    torch.testing.assert_close(bank(x, ids), target(x, hyper(z), ids).detach())
    latent = TaskBank.from_latents(hyper, z, target=target)
    assert torch.equal(latent(x, ids), bank(x, ids))


def test_keeps_a_copy_of_the_hypernetwork():
    hyper, z = make_hyper(), torch.randn(2, 4)
    bank = TaskBank.from_latents(hyper, z)
    before = bank.weights([0])
    with torch.no_grad():
        hyper.head.weight.zero_()
    torch.testing.assert_close(bank.weights(bank.add(z[:1])), before)


def test_add_update_remove():
    hyper, z = make_hyper(), torch.randn(9, 4)
    bank = TaskBank.from_latents(hyper, z[:5])
    flat = hyper.spec.flatten(hyper(z)).detach()
    assert bank.ids().tolist() == [0, 1, 2, 3, 4]
    assert bank.add(z[5:7]).tolist() == [5, 6]
    assert bank.add(weights=hyper(z[7:8])).tolist() == [7]
    assert len(bank) == 8
    torch.testing.assert_close(bank.weights(bank.ids()), flat[:8])
    bank.update(torch.tensor([7, 2]), z[[8, 0]])
    bank.update(3, weights=flat[1:2])
    torch.testing.assert_close(bank.weights([7, 2, 3, 4]), flat[[8, 0, 1, 4]])
    torch.testing.assert_close(bank.latents([7, 2]), z[[8, 0]])
    with pytest.raises(ValueError, match="given by latents"):
        bank.latents([3])
    bank.remove([1, 6])
    assert len(bank) == 6
    assert 1 not in bank
    assert 2 in bank
    assert bank.ids().tolist() == [0, 2, 3, 4, 5, 7]


def test_removed_id_never_stands_for_another():
    bank = TaskBank.from_latents(make_hyper(), torch.randn(4, 4))
    seen = set(bank.ids().tolist())
    x = torch.randn(1, 5)
    for _ in range(5):
        old = bank.ids()[:2]
        bank.remove(old)
        new = bank.add(torch.randn(2, 4))
        assert seen.isdisjoint(new.tolist())
        seen.update(new.tolist())
        for task in old:
            with pytest.raises(IndexError, match=f"id {int(task)}"):
                bank(x, task.view(1))
            with pytest.raises(IndexError):
                bank.remove([int(task)])
            with pytest.raises(IndexError):
                bank.update([int(task)], torch.randn(1, 4))
            assert int(task) not in bank
    # Slots are reused: neither the table nor the weights grow with the ids ever issued.
    assert bank.contents.table._places == 4
    assert bank.contents.table.weights.slots <= 4 + 64


def test_a_slot_with_no_ids_left_stays_empty(monkeypatch):
    monkeypatch.setattr("hyperfast.bank.table.LAST", 2 << 32)
    bank = TaskBank.from_latents(make_hyper(), torch.randn(1, 4))
    ids = [0]
    for _ in range(4):
        bank.remove(ids[-1])
        ids += bank.add(torch.randn(1, 4)).tolist()
    assert ids == [0, 1 << 32, 2 << 32, 1, (1 << 32) + 1]


@pytest.mark.parametrize("task", [9, -1, -2, 1 << 32, (1 << 62) + 1, -(1 << 32)])
def test_unknown_ids(task):
    bank = TaskBank.from_latents(make_hyper(), torch.randn(9, 4))
    ids = torch.tensor([0, task, 3])
    for bad in (bank, TaskBank.from_latents(make_hyper(), torch.empty(0, 4))):
        with pytest.raises(IndexError, match="no task of the bank"):
            bad(torch.randn(3, 5), ids)
        assert task not in bad


def test_many_segments_hold_what_was_stored(monkeypatch):
    monkeypatch.setattr("hyperfast.bank.rows.MERGE", 4000)
    spec = MLPSpec((5, 7, 3))
    flat = torch.randn(1000, spec.numel)
    bank = TaskBank.from_weights(spec, flat[:3])
    for n in range(3, 1000, 7):
        bank.add(weights=flat[n : n + 7])
    assert 2 < len(bank.contents.table.weights.segments) < 10
    assert torch.equal(bank.weights(bank.ids()), flat)
    x, ids = rows_of(1000, 300, 5)
    torch.testing.assert_close(
        bank(x, ids), TargetNet()(x, spec.split(flat), ids), rtol=1e-5, atol=1e-5
    )


def test_keys():
    z = torch.randn(3, 4)
    bank = TaskBank.from_latents(make_hyper(), z, keys=["ann", 7, "7"])
    assert bank.ids(["7", "ann", 7, "7"]).tolist() == [2, 0, 1, 2]
    assert bank.keys == {"ann": 0, 7: 1, "7": 2}
    assert bank.ids([]).tolist() == []
    with pytest.raises(KeyError):
        bank.ids(["bob"])
    for taken in ("ann", 7):
        with pytest.raises(ValueError, match=f"keys must be new.*: {taken!r} is taken"):
            bank.add(z[:2], keys=["x", taken])
    with pytest.raises(ValueError, match="different from each other: 'x' comes twice"):
        bank.add(z[:2], keys=["x", "x"])
    with pytest.raises(ValueError, match="hold 2 keys"):
        bank.add(z[:2], keys=["x"])
    for wrong in (1.5, None, True):
        with pytest.raises(TypeError, match="str or int"):
            bank.add(z[:1], keys=[wrong])
    assert len(bank) == 3
    bank.remove(bank.ids(["ann"]))
    assert "ann" not in bank.keys
    assert bank.ids().tolist() == [1, 2]
    task = bank.add(z[:1], keys=["ann"])
    assert bank.ids(["ann"]).tolist() == task.tolist()
    with pytest.raises(TypeError):
        bank.keys["eve"] = 1


def test_budget_equals_keeping_all():
    hyper, z = make_hyper(), torch.randn(100, 4)
    full = TaskBank.from_latents(hyper, z)
    size = full.spec.numel * 4
    bank = TaskBank.from_latents(hyper, z, max_bytes=10 * size + 5)
    for seed in range(20):
        x, ids = rows_of(100 if seed % 2 else 12, 40, 5, seed)
        torch.testing.assert_close(bank(x, ids), full(x, ids))
        assert bank.contents.table.resident <= 10
        assert bank.contents.table.weights.slots == 10
    torch.testing.assert_close(bank.weights(bank.ids()), full.weights(full.ids()))
    bank.update([1], z[:1])
    bank.remove([0])
    with pytest.raises(IndexError):
        bank(x[:1], torch.tensor([0]))
    torch.testing.assert_close(bank.weights([1]), full.weights([0]))
    with pytest.raises(ValueError, match="memory budget"):
        bank.add(weights=full.weights([0]))
    with pytest.raises(ValueError, match="max_bytes must be at least"):
        TaskBank.from_latents(hyper, z, max_bytes=size - 1)


def test_budget_evicts_the_least_recently_used(monkeypatch):
    bank = TaskBank.from_latents(make_hyper(), torch.randn(9, 4), max_bytes=3 * 66 * 4)
    made = []
    original = bank.contents.generate
    monkeypatch.setattr(bank.contents, "generate", lambda z: made.append(len(z)) or original(z))

    def use(*ids):
        made.clear()
        bank(torch.randn(len(ids), 5), torch.tensor(ids))
        return sum(made)

    assert use(0, 1, 2, 1) == 3
    assert use(2, 0, 1) == 0
    assert use(0) == 0
    assert use(2) == 0
    assert use(5, 5) == 1  # in place of 1
    assert use(0, 2, 5) == 0
    assert use(1) == 1


def test_adding_latents_to_a_budget_generates_nothing(monkeypatch):
    bank = TaskBank.from_latents(make_hyper(), torch.randn(9, 4), max_bytes=3 * 66 * 4)
    monkeypatch.setattr(bank.contents, "generate", None)
    bank.add(torch.randn(1000, 4))
    assert len(bank) == 1009
    assert bank.contents.table.resident == 0


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8])
def test_error_report_tells_the_truth(dtype):
    hyper, z = make_hyper(dtype=torch.float64), torch.randn(300, 4, dtype=torch.float64)
    bank = TaskBank.from_latents(hyper, z, dtype=dtype)
    report = bank.error_report()
    flat = hyper.spec.flatten(hyper(z)).detach()
    error = bank.weights(bank.ids()).double() - flat
    assert report.layers[0].weight_max == float(error[:, :42].abs().max())
    relative = error[:, 42:].norm() / flat[:, 42:].norm()
    assert report.layers[1].weight_relative == pytest.approx(float(relative))
    unit = 1 / 127 if dtype == torch.int8 else torch.finfo(dtype).eps / 2
    for layer in report.layers:
        assert layer.weight_relative <= unit
        assert layer.output_relative <= 4 * unit
        assert (layer.output_max > 0) == (dtype != torch.float64)
    given = TaskBank.from_weights(hyper.spec, flat, dtype=dtype)
    again = given.error_report(flat[:10], ids=range(10))
    assert again.layers[0].weight_max == float(error[:10, :42].abs().max())
    assert "5 -> 7" in str(report)
    with pytest.raises(ValueError, match="weights must be given"):
        given.error_report()


def test_explain():
    hyper = make_hyper()
    bank = TaskBank.from_latents(hyper, torch.randn(9, 4))
    costs = bank.explain()
    assert (costs.tasks, costs.resident) == (9, 9)
    assert (costs.keep_bytes, costs.regenerate_bytes) == (66 * 4, 16)
    assert costs.choice == "keep"
    assert "9 tasks" in str(costs)
    with pytest.raises(ValueError, match="hypernetwork"):
        TaskBank.from_weights(hyper.spec, torch.randn(1, 66)).explain()


def test_bad_input():
    hyper, z = make_hyper(), torch.randn(9, 4)
    bank = TaskBank.from_latents(hyper, z)
    x, ids = rows_of(9, 8, 5)
    cases = [
        (TypeError, "x must be a Tensor", lambda: bank([1.0], ids)),
        (TypeError, "floating-point", lambda: bank(x.long(), ids)),
        (TypeError, "task_ids must be a Tensor", lambda: bank(x, [1] * 8)),
        (TypeError, "int64", lambda: bank(x, ids.int())),
        (ValueError, "shape", lambda: bank(x[:, :4], ids)),
        (ValueError, "shape", lambda: bank(x, ids[:7])),
        (ValueError, "device", lambda: bank(x.to("meta"), ids)),
        (TypeError, "z must be a Tensor", lambda: TaskBank.from_latents(hyper, None)),
        (TypeError, "one of z and weights", lambda: bank.add()),
        (TypeError, "one of z and weights", lambda: bank.add(z, weights=hyper(z))),
        (ValueError, r"z must have shape \(n, 4\)", lambda: bank.add(z[0])),
        (TypeError, "z must be", lambda: bank.add(z.double())),
        (ValueError, "weights must have shape", lambda: bank.add(weights=z)),
        (TypeError, "floating-point", lambda: bank.add(weights=torch.ones(1, 66).int())),
        (ValueError, "ids must hold 9", lambda: bank.update([1], z)),
        (ValueError, "different from each other: 1 comes twice", lambda: bank.remove([0, 1, 1])),
        (TypeError, "int64", lambda: bank.remove(torch.tensor([1.0]))),
        (ValueError, "shape", lambda: bank.remove(torch.tensor([[1]]))),
        (TypeError, "bank.keys", lambda: "ann" in bank),
        (TypeError, "hyper must be", lambda: TaskBank.from_latents(None, z)),
        (TypeError, "dtype", lambda: TaskBank.from_latents(hyper, z, dtype=torch.int32)),
        (TypeError, "spec", lambda: TaskBank.from_weights((1, 2), z)),
        (
            ValueError,
            "weight_transform",
            lambda: TaskBank.from_latents(hyper, z, target=TargetNet(weight_transform=torch.abs)),
        ),
        (ValueError, "too large", lambda: _store(1e6, torch.float16)),
        (ValueError, "finite", lambda: _store(float("nan"), torch.int8)),
        (ValueError, "finite", lambda: _store(float("inf"), torch.int8)),
        (ValueError, "hypernetwork", lambda: _store(1.0, torch.int8).add(z)),
    ]
    for error, match, call in cases:
        with pytest.raises(error, match=match):
            call()
    assert len(bank) == 9
    assert torch.equal(bank.ids(), torch.arange(9))


def _store(value, dtype):
    return TaskBank.from_weights(MLPSpec((1, 1)), torch.tensor([[value, 0.0]]), dtype=dtype)


@pytest.mark.parametrize("ids", [[2.7], [True], 2.7, None, "u3", ["u3"], {}], ids=repr)
def test_ids_that_are_no_ints_touch_nothing(ids):
    bank = TaskBank.from_latents(HyperNet(4, 2, 3, 1), torch.randn(6, 4))
    with pytest.raises(TypeError, match=r"ids must be ints or an int64 tensor"):
        bank.remove(ids)
    assert bank.ids().tolist() == list(range(6))


@pytest.mark.parametrize(
    "ids",
    [[numpy.int64(2)], numpy.int32(2), numpy.array([2]), numpy.array(2), [torch.tensor(2)], (2,)],
    ids=repr,
)
def test_ids_of_any_integer_kind(ids):
    bank = TaskBank.from_latents(make_hyper(), torch.randn(6, 4))
    want = bank.weights([2])
    assert torch.equal(bank.weights(ids), want)
    bank.update(ids, bank.latents([3]))
    torch.testing.assert_close(bank.weights(ids), bank.weights([3]))
    bank.error_report(ids=ids)
    bank.remove(ids)
    assert bank.ids().tolist() == [0, 1, 3, 4, 5]
    for task in (numpy.int64(3), numpy.uint8(3), torch.tensor(3)):
        assert task in bank
    assert numpy.int64(2) not in bank


@pytest.mark.parametrize(
    "ids",
    [
        *(numpy.array([True]), [numpy.True_], numpy.array([1.0]), numpy.array([[1]])),
        *([torch.tensor(True)], [torch.tensor(1.0)], [numpy.float32(1)], b"ab"),
    ],
    ids=repr,
)
def test_ids_of_other_kinds(ids):
    bank = TaskBank.from_latents(make_hyper(), torch.randn(6, 4))
    with pytest.raises(TypeError, match="ids must be ints"):
        bank.remove(ids)
    assert len(bank) == 6
    for task in (True, numpy.True_, torch.tensor(True), 1.0):
        with pytest.raises(TypeError, match="a task id must be an int"):
            task in bank  # noqa: B015
    with pytest.raises(IndexError, match=f"the id {2**70}"):
        bank.weights([2**70])


def test_keys_of_any_integer_or_str_kind(tmp_path):
    z = torch.randn(4, 4)
    keys = [numpy.int64(7), numpy.str_("ann"), torch.tensor(9), numpy.uint8(3)]
    bank = TaskBank.from_latents(make_hyper(), z, keys=keys)
    bank.save(tmp_path / "b")
    for one in (bank, TaskBank.open(tmp_path / "b")):
        assert one.keys == {7: 0, "ann": 1, 9: 2, 3: 3}
        assert {type(key) for key in one.keys} == {int, str}
        assert one.ids(keys).tolist() == [0, 1, 2, 3]
        assert one.ids(numpy.array([9, 7])).tolist() == [2, 0]
    for wrong in (True, numpy.True_, torch.tensor(True), 7.0, None):
        with pytest.raises(TypeError, match="keys must be str or int"):
            bank.ids([wrong])
        with pytest.raises(TypeError, match="keys must be str or int"):
            bank.add(z[:1], keys=[wrong])
    assert len(bank) == 4


def test_one_key_is_no_list_of_keys():
    bank = TaskBank.from_latents(make_hyper(), torch.randn(3, 4), keys=["1", "2", "12"])
    assert bank.ids(["12"]).tolist() == [2]
    with pytest.raises(TypeError, match="keys must hold keys, got the single key '12'"):
        bank.ids("12")


@pytest.mark.parametrize("value", [1e40, -1e40])
@pytest.mark.parametrize("place", [0, -1], ids=["weight", "bias"])
def test_int8_refuses_what_its_scales_and_biases_cannot_hold(value, place):
    spec = MLPSpec((3, 4))
    flat = torch.zeros(1, spec.numel, dtype=torch.float64)
    flat[0, place] = value
    with pytest.raises(ValueError, match=r"weights must fit into torch\.int8"):
        TaskBank.from_weights(spec, flat, dtype=torch.int8)


def test_a_method_of_a_module_as_activation_is_the_banks_own():
    hyper = HyperNet(5, 3, 4, 2)
    dropout = torch.nn.Dropout(0.5)
    bank = TaskBank.from_latents(hyper, torch.randn(3, 5), target=TargetNet(dropout.forward))
    x, ids = torch.randn(30, 3), torch.randint(3, (30,))
    assert torch.equal(bank(x, ids), bank(x, ids))
    assert dropout.training


def test_one_key_for_many_tasks_is_refused():
    hyper = HyperNet(5, 3, 4, 2)
    for key in ("abc", 7):
        with pytest.raises(TypeError, match=f"keys must hold keys, got the single key {key!r}"):
            TaskBank.from_latents(hyper, torch.randn(3, 5), keys=key)
    with pytest.raises(TypeError, match="keys must hold keys, got the single key 5"):
        TaskBank.from_latents(hyper, torch.randn(3, 5)).ids(5)
