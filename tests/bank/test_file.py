"""Banks on disk: what is saved is opened, what is damaged is refused."""

import json
import os
import random
import struct
import warnings
import zlib

import pytest
import torch
from safetensors import safe_open
from torch import nn

from hyperfast import HyperNet, MLPSpec, Sine, TargetNet, TaskBank
from hyperfast.bank.file import BankFileError
from hyperfast.bank.log import FRAME

DAMAGED = int(os.environ.get("HYPERFAST_DAMAGED_FILES", "300"))


def make_hyper(seed=0):
    torch.manual_seed(seed)
    return HyperNet(4, 5, 7, 3, hidden=6, target_activation="tanh")


def content(bank):
    """Everything that a file must bring back."""
    ids = bank.ids()
    return ids.tolist(), bank.weights(ids), dict(bank.keys)


def same(a, b):
    return a[0] == b[0] and torch.equal(a[1], b[1]) and a[2] == b[2]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "b.safetensors"


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8]
)
@pytest.mark.parametrize("tasks", [0, 1, 3, 63])
def test_opens_what_was_saved(path, dtype, tasks):
    hyper = make_hyper()
    z = torch.randn(tasks + 2, 4)
    bank = TaskBank.from_latents(hyper, z, dtype=dtype, keys=["ann", *range(tasks + 1)])
    bank.remove([1])
    bank.remove(bank.add(torch.randn(2, 4)))
    bank.save(path)
    opened = TaskBank.open(path, hyper=hyper, verify=True)
    assert same(content(opened), content(bank))
    assert torch.equal(opened.latents(bank.ids()), bank.latents(bank.ids()))
    assert (opened.dtype, opened.spec) == (bank.dtype, bank.spec)
    x, ids = torch.randn(40, 5), bank.ids()[torch.randint(len(bank), (40,))]
    assert torch.equal(opened(x, ids), bank(x, ids))
    assert opened.error_report().layers == bank.error_report().layers
    # Ids that were removed before stay removed, and new ones are the same as without a file.
    with pytest.raises(IndexError):
        opened.weights([1])
    assert opened.add(z).tolist() == bank.add(z).tolist()
    assert same(content(opened), content(bank))
    opened.save(path)
    assert same(content(TaskBank.open(path)), content(bank))


def test_a_bank_with_a_budget_saves_latents_only(path):
    hyper, z = make_hyper(), torch.randn(300, 4)
    bank = TaskBank.from_latents(hyper, z, max_bytes=10 * 66 * 4)
    bank.weights(bank.ids())
    bank.save(path)
    assert path.stat().st_size < 300 * (16 + 24) + 2000
    opened = TaskBank.open(path, hyper=hyper)
    assert opened.max_bytes == bank.max_bytes
    assert TaskBank.open(path, hyper=hyper, max_bytes=1000).max_bytes == 1000
    assert same(content(opened), content(bank))
    with pytest.raises(ValueError, match="hyper must be given"):
        TaskBank.open(path)
    with pytest.raises(BankFileError, match="another hypernetwork"):
        TaskBank.open(path, hyper=make_hyper(1))
    with pytest.raises(ValueError, match="max_bytes must be at least"):
        TaskBank.open(path, hyper=hyper, max_bytes=1)


def test_is_a_safetensors_file(path):
    bank = TaskBank.from_latents(make_hyper(), torch.randn(9, 4), dtype=torch.int8, keys=range(9))
    bank.save(path)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert tensors.keys() == {"weights", "affine", "latents", "table", "keys", "checksums"}
    assert torch.equal(tensors["weights"], bank.contents.table.weights.take(bank.ids())[0])
    assert torch.equal(tensors["latents"], bank.latents(bank.ids()))


ACTIVATIONS = [
    *(("relu", "relu"), ("gelu_tanh", "gelu_tanh"), ("softplus", "softplus")),
    *((Sine(30), "sin:30.0"), (nn.LeakyReLU(0.3), "leaky_relu:0.3"), ("sin", "sin:1.0")),
    *((nn.ELU(), "elu"), (["gelu", "sigmoid"], None), ("identity", ""), (nn.Identity(), "")),
]


@pytest.mark.parametrize(("activation", "text"), ACTIVATIONS, ids=repr)
@pytest.mark.parametrize("bias", [True, False])
def test_a_file_says_its_network(path, activation, text, bias):
    spec = MLPSpec((2, 3, 1), bias)
    x, ids = torch.randn(30, 2), torch.randint(3, (30,))
    flat = torch.randn(3, spec.numel)
    bank = TaskBank.from_weights(spec, flat, target=TargetNet(activation))
    bank.save(path)
    opened = TaskBank.open(path)
    assert opened.spec == spec
    assert torch.equal(opened(x, ids), bank(x, ids))
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["bank"])
    if text is not None:
        b = " b" if bias else ""
        assert meta["network"] == f"2 > 3{b} {text}".rstrip() + f", 1{b}"
    assert not {"sizes", "bias", "activations"} & meta.keys()


def test_activations_that_a_file_cannot_hold(path):
    spec, flat = MLPSpec((2, 2, 1)), torch.randn(3, 9)
    bank = TaskBank.from_weights(spec, flat)
    bank.save(path)
    before = path.read_bytes()
    hooked = nn.ReLU()
    hooked.register_forward_hook(lambda *_: None)
    trained = Sine(nn.Parameter(torch.tensor(2.0)))
    for activation in (torch.tanh, nn.PReLU(), nn.ELU(0.5), nn.Softplus(2), hooked, trained):
        bank = TaskBank.from_weights(spec, flat, target=TargetNet(activation))
        with pytest.raises(ValueError, match="a file can hold the activations"):
            bank.save(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize(
    "network",
    [
        *("", "5", "5 > 7", "5 > 7 s tanh, 3 s", "5 > 7 b tanh, 3", "5 > 7 b tanh exp(W), 3 b"),
        *("5 > 7 b tan, 3 b", "5 > 7 b sin:x, 3 b", "5  > 7 b tanh, 3 b", "6 > 7 b, 3 b"),
        *(5, None, ["5 > 7"]),
    ],
    ids=repr,
)
def test_networks_that_are_none(path, originals, network):
    """A description that lies, its checksums in order."""
    path.write_bytes(described(originals[0][0], network))
    with pytest.raises(BankFileError):
        TaskBank.open(path)
    path.write_bytes(described(originals[0][0], "5 > 7 b tanh, 3 b"))
    assert len(TaskBank.open(path)) == 8


def test_a_failed_save_leaves_the_old_file(path, monkeypatch):
    bank = TaskBank.from_latents(make_hyper(), torch.randn(9, 4))
    bank.save(path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("hyperfast.bank.file.os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        bank.save(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_maps_and_verifies_on_first_use(path):
    spec = MLPSpec((63, 63, 3))
    bank = TaskBank.from_weights(spec, torch.randn(100, spec.numel))
    bank.save(path)
    data = bytearray(path.read_bytes())
    data[-50 * spec.numel * 4] ^= 1
    path.write_bytes(data)
    with pytest.raises(BankFileError, match=r"weights .* damaged in its rows"):
        TaskBank.open(path, verify=True)
    opened = TaskBank.open(path)
    x = torch.randn(1, 63)
    hurt = []
    for task in range(100):
        try:
            assert torch.equal(opened(x, torch.tensor([task])), bank(x, torch.tensor([task])))
        except BankFileError:
            hurt.append(task)
    assert 0 < len(hurt) <= 1 + 65536 // (4 * spec.numel)
    assert hurt == list(range(hurt[0], hurt[-1] + 1))
    with pytest.raises(BankFileError):
        opened.save(path.with_name("copy"))
    assert not path.with_name("copy").exists()


def test_log_brings_back_every_change(path):
    hyper, z = make_hyper(), torch.randn(9, 4)
    TaskBank.from_latents(hyper, z, keys=range(9)).save(path)
    bank = TaskBank.open(path, hyper=hyper, log=True)
    for step in range(3):
        bank.add(z, keys=[f"{step}.{n}" for n in range(9)])
        bank.remove(bank.ids()[[1, 3]])
        updated = bank.ids()[:2]
        bank.update(updated, z[:2])
        bank.add(weights=torch.randn(2, 66))
        for kwargs in ({}, {"hyper": hyper}, {"verify": True}):
            assert same(content(TaskBank.open(path, **kwargs)), content(bank))
        if step == 1:
            bank.save(path)
            assert os.path.getsize(f"{path}.log") < 200
            assert same(content(TaskBank.open(path)), content(bank))
    with pytest.raises(BankFileError, match="written by another bank"):
        TaskBank.open(path, log=True)
    bank.close()
    with pytest.raises(OSError, match="closed"):
        bank.add(weights=torch.randn(1, 66))
    again = TaskBank.open(path, hyper=hyper, log=True)
    assert same(content(again), content(bank))
    assert torch.equal(again.latents(updated), z[:2])
    again.close()


def test_log_of_a_bank_with_a_budget(path):
    hyper, z = make_hyper(), torch.randn(9, 4)
    TaskBank.from_latents(hyper, z, max_bytes=3 * 66 * 4).save(path)
    bank = TaskBank.open(path, hyper=hyper, log=True)
    bank.remove(bank.ids()[:3])
    bank.update(5, z[:1])
    bank.add(z)
    bank.close()
    assert same(content(TaskBank.open(path, hyper=hyper)), content(bank))


def test_torn_tail_is_cut_off_at_every_length(path):
    hyper, z = make_hyper(), torch.randn(9, 4)
    TaskBank.from_latents(hyper, z).save(path)
    bank = TaskBank.open(path, hyper=hyper, log=True)
    log = path.with_name(path.name + ".log")
    states, ends = [content(bank)], [log.stat().st_size]
    for change in (lambda: bank.add(z[:1], keys=["a"]), lambda: bank.remove([2])):
        change()
        states.append(content(bank))
        ends.append(log.stat().st_size)
    bank.close()
    whole = log.read_bytes()
    for size in range(len(whole) + 1):
        log.write_bytes(whole[:size])
        done = max([n for n, end in enumerate(ends) if end <= size], default=0)
        assert same(content(TaskBank.open(path)), states[done])  # reads, and leaves the log alone
        assert log.stat().st_size == size
        if size % 31 and size not in ends:
            continue
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            opened = TaskBank.open(path, hyper=hyper, log=True)
        assert ["never acknowledged" in str(w.message) for w in caught] == [True] * (
            size not in ends and size > ends[0]
        )
        assert same(content(opened), states[done])
        opened.add(z[:1], keys=["b"])
        opened.close()
        assert same(content(TaskBank.open(path)), content(opened))


def test_damage_before_the_tail_is_refused(path):
    hyper, z = make_hyper(), torch.randn(9, 4)
    TaskBank.from_latents(hyper, z).save(path)
    bank = TaskBank.open(path, hyper=hyper, log=True)
    log = path.with_name(path.name + ".log")
    bank.add(z[:1])
    last = log.stat().st_size
    bank.remove([2])
    bank.close()
    whole = log.read_bytes()
    for at in range(0, last, 7):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        log.write_bytes(damaged)
        with pytest.raises(BankFileError, match="log"):
            TaskBank.open(path)


def test_a_log_that_cannot_be_written_stops_changes(path, monkeypatch):
    bank = TaskBank.from_weights(MLPSpec((1, 1)), torch.randn(3, 2))
    bank.save(path)
    bank = TaskBank.open(path, log=True)
    before = content(bank)
    with monkeypatch.context() as patch:
        patch.setattr("hyperfast.bank.file.os.fsync", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            bank.add(weights=torch.randn(1, 2))
    with pytest.raises(OSError, match="could not be written before"):
        bank.remove([0])
    assert same(content(bank), before)
    bank.save(path)  # mends it
    bank.remove([0])
    assert same(content(TaskBank.open(path)), content(bank))
    bank.close()


def test_logs_of_other_banks(path):
    spec = MLPSpec((1, 1))
    first, second = (TaskBank.from_weights(spec, torch.randn(3, 2)) for _ in range(2))
    first.save(path)
    logged = TaskBank.open(path, log=True)
    logged.add(weights=torch.randn(1, 2))
    with pytest.raises(BankFileError, match="written by another bank"):
        second.save(path)
    logged.close()
    log = path.with_name(path.name + ".log")
    old = log.read_bytes()
    second.save(path)  # replaces the bank, so that its log is no more
    assert not log.exists()
    log.write_bytes(old)
    with pytest.raises(BankFileError, match="another bank"):
        TaskBank.open(path)


def test_what_is_no_bank(path, tmp_path):
    for data in (b"", b"{}", b"\0" * 8, b"\xff" * 100, b"\x08" + b"\0" * 7 + b"{}      "):
        path.write_bytes(data)
        with pytest.raises(BankFileError):
            TaskBank.open(path)
    with pytest.raises(FileNotFoundError):
        TaskBank.open(tmp_path / "none", log=True)
    assert not (tmp_path / "none.log").exists()
    with pytest.raises(BankFileError, match="regular"):
        TaskBank.open(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(BankFileError, match="regular"):
            TaskBank.open(tmp_path / "pipe")
    assert issubclass(BankFileError, ValueError)


# Damaged files at random: refused, or opened with the right content.


def damage(data, rng):
    """Flips bits, cuts, appends, or overwrites."""
    data = bytearray(data)
    kind = rng.randrange(5)
    if kind == 0:
        for _ in range(rng.choice([1, 1, 1, 2, 8])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[rng.randrange(len(data)) :]
    elif kind == 2:
        data += rng.randbytes(rng.choice([1, 8, 100]))
    elif kind == 3:
        at, size = rng.randrange(len(data)), rng.choice([1, 4, 8, 512, 4096])
        data[at : at + size] = rng.choice([bytes, rng.randbytes])(len(data[at : at + size]))
    else:
        at, size = rng.randrange(len(data)), rng.choice([1, 8, 100])
        del data[at : at + size]
    return bytes(data)


HOSTILE = [-1, 0, 1, 2, 7, 2**31, 2**32 + 1, 2**63 - 1, 2**64, 10**30, 1.5, "1", None, True, []]


def described(data, network):
    """The file with another description of its network."""
    length = struct.unpack("<Q", data[:8])[0]
    head = json.loads(data[8 : 8 + length])
    meta = json.loads(head["__metadata__"]["bank"]) | {"network": network}
    head["__metadata__"]["bank"] = json.dumps(meta, sort_keys=True)
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    block = bytearray(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return bytes(sealed(block, len(text) + 8))


def hostile(data, rng):
    """A header that lies, its checksums in order."""
    length = struct.unpack("<Q", data[:8])[0]
    head, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    meta = json.loads(head["__metadata__"]["bank"])
    names = [name for name in head if name != "__metadata__"]
    entry = head[rng.choice(names)]
    kind = rng.randrange(7)
    if kind == 0:
        entry["shape"][rng.randrange(len(entry["shape"]))] = rng.choice(HOSTILE)
    elif kind == 1:
        entry["data_offsets"][rng.randrange(2)] = rng.choice(HOSTILE)
    elif kind == 2:
        entry["data_offsets"] = head[rng.choice(names)]["data_offsets"]
    elif kind == 3:
        entry["dtype"] = rng.choice(["F64", "F32", "I8", "U8", "BF16", "F128", 5])
    elif kind == 4:
        meta[rng.choice([*meta])] = rng.choice([*HOSTILE, [1] * 9, ["relu"], "int8"])
    elif kind == 5:
        widths = ["5", "7", "3"]
        widths[rng.randrange(3)] = str(rng.choice(HOSTILE))
        meta["network"] = "{} > {} b tanh, {} b".format(*widths)
    else:
        del head[rng.choice([*head])]
    if "__metadata__" in head:
        head["__metadata__"]["bank"] = json.dumps(meta, sort_keys=True)
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    block = bytearray(struct.pack("<Q", len(text)) + text + body)
    return bytes(sealed(block, len(text) + 8))


def sealed(block, head):
    """Makes the first and last of the checksums fit, if they are where they should be."""
    try:
        count = json.loads(block[8:head])["checksums"]["shape"][0]
        struct.pack_into("<q", block, head, zlib.crc32(block[:head]))
        sums = zlib.crc32(block[head : head + 8 * (count - 1)])
        struct.pack_into("<q", block, head + 8 * (count - 1), sums)
    except (KeyError, TypeError, IndexError, struct.error, OverflowError):
        pass
    return block


def hostile_table(data, rng):
    """A table that lies, its checksum in order."""
    block = bytearray(data)
    head = 8 + struct.unpack("<Q", data[:8])[0]
    entry = json.loads(data[8:head])["table"]
    start, end = (head + n for n in entry["data_offsets"])
    for _ in range(rng.choice([1, 1, 5])):
        at = start + 8 * rng.randrange((end - start) // 8)
        struct.pack_into("<q", block, at, rng.choice([-2, -1, 0, 1, 8, 9, 63, 2**32, 2**62]))
    parts = [*json.loads(data[8:head])]
    assert parts[1:3] == ["checksums", "table"]  # so that the table's checksum is the second
    struct.pack_into("<q", block, head + 8, zlib.crc32(block[start:end]))
    return bytes(sealed(block, head))


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Some files, with what they hold."""
    folder = tmp_path_factory.mktemp("banks")
    hyper = make_hyper()
    files = []
    for n, kwargs in enumerate(
        [{"keys": range(9)}, {"dtype": torch.int8}, {"max_bytes": 3000}, {"dtype": torch.bfloat16}]
    ):
        bank = TaskBank.from_latents(hyper, torch.randn(9, 4), **kwargs)
        bank.remove([3])
        bank.save(folder / str(n))
        used = hyper if "max_bytes" in kwargs else None
        files.append(((folder / str(n)).read_bytes(), used, content(bank)))
    return files


def test_damaged_files(path, originals):
    rng = random.Random(0)
    refused = 0
    for _ in range(DAMAGED):
        data, hyper, want = rng.choice(originals)
        path.write_bytes(damage(data, rng))
        try:
            got = content(TaskBank.open(path, hyper=hyper))
        except BankFileError:
            refused += 1
            continue
        assert same(got, want)
    assert refused > 0.9 * DAMAGED


@pytest.mark.parametrize("lie", [hostile, hostile_table])
def test_hostile_files(path, originals, lie):
    rng = random.Random(0)
    refused = 0
    for _ in range(DAMAGED):
        data, hyper, _ = rng.choice(originals)
        path.write_bytes(lie(data, rng))
        try:
            bank = TaskBank.open(path, hyper=hyper)
            assert len(bank.keys) <= len(bank)  # reads them
        except (BankFileError, ValueError):
            refused += 1
            continue
        ids = bank.ids()
        assert len(ids) == len(bank)
        assert bank.weights(ids).shape == (len(ids), bank.spec.numel)
        if len(ids):
            bank(torch.randn(40, bank.spec.sizes[0]), ids[torch.randint(len(ids), (40,))])
            bank.remove(ids[:1])
        if hyper is None:
            bank.add(weights=torch.randn(3, bank.spec.numel))
            assert bank.weights(bank.ids()).shape[0] == len(bank)
    assert refused > 0.3 * DAMAGED


def test_hostile_headers_by_hand(path, originals):
    data = originals[0][0]
    length = struct.unpack("<Q", data[:8])[0]
    for size in (0, 1, length - 8, length + 8, len(data), 2**31, 2**63, 2**64 - 1):
        path.write_bytes(struct.pack("<Q", size) + data[8:])
        with pytest.raises(BankFileError):
            TaskBank.open(path)
    for text in (b"[" * 60000, b'{"a":' * 12000, b"9" * 60000, b"null", b'"', b"\xff\xfe{}", b"[]"):
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        with pytest.raises(BankFileError):
            TaskBank.open(path)


def test_damaged_logs(path):
    hyper, z = make_hyper(), torch.randn(9, 4)
    TaskBank.from_latents(hyper, z).save(path)
    log = path.with_name(path.name + ".log")
    bank = TaskBank.open(path, hyper=hyper, log=True)
    states = [content(bank)]
    for n in range(5):
        bank.add(z[n : n + 1], keys=[n])
        states.append(content(bank))
        bank.remove(bank.ids()[:1])
        states.append(content(bank))
    bank.close()
    whole = log.read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(DAMAGED // 3):
        log.write_bytes(damage(whole, rng))
        try:
            got = content(TaskBank.open(path))
        except BankFileError:
            refused += 1
            continue
        # Either untouched, or it lost its tail: what is left is what was there at some time.
        assert any(same(got, state) for state in states)
    assert refused > 0.1 * DAMAGED


def test_hostile_log_records(path):
    TaskBank.from_weights(MLPSpec((1, 1)), torch.randn(3, 2)).save(path)
    log = path.with_name(path.name + ".log")
    TaskBank.open(path, log=True).close()
    begin = log.read_bytes()

    def write(meta, tensors, sequence):
        bank = TaskBank.open(path, log=True)
        bank.contents.log.append(sequence, meta, tensors)
        bank.close()

    ids = torch.tensor([3])
    flat = torch.randn(1, 2)
    for meta, tensors, sequence in [
        ({"op": "add"}, {"ids": ids, "weights": flat}, 3),
        ({"op": "add"}, {"ids": ids, "weights": flat[:, :1]}, 2),
        ({"op": "add"}, {"ids": ids, "weights": flat.double()}, 2),
        ({"op": "add"}, {"ids": ids}, 2),
        ({"op": "add"}, {"weights": flat}, 2),
        ({"op": "add"}, {"ids": ids + 1, "weights": flat}, 2),
        ({"op": "add"}, {"ids": ids - 1, "weights": flat}, 2),
        ({"op": "add"}, {"ids": torch.tensor([3, 3]), "weights": flat.expand(2, 2)}, 2),
        ({"op": "update"}, {"ids": ids, "weights": flat}, 2),
        ({"op": "remove"}, {"ids": ids}, 2),
        ({"op": "remove"}, {"ids": ids.double()}, 2),
        ({"op": "begin"}, {"ids": ids - 1}, 2),
        ({"op": "save"}, {"ids": ids - 1}, 2),
        ({}, {"ids": ids - 1}, 2),
        ({"op": ["add"]}, {"ids": ids - 1}, 2),
    ]:
        log.write_bytes(begin)
        write(meta, tensors, sequence)
        with pytest.raises(BankFileError, match="does not fit"):
            TaskBank.open(path)
    # A length beyond the end is a torn tail, whatever it claims.
    for length in (1, 2**40, 2**64 - 1):
        frame = FRAME.pack(b"HFR1", 0, length, 2, 0)[:-4]
        log.write_bytes(begin + frame + struct.pack("<I", zlib.crc32(frame)))
        assert len(TaskBank.open(path)) == 3


@pytest.mark.parametrize("content", [b"epoch 1 loss 0.5 ok\n" * 50, b"junk", bytes(4096)])
def test_a_file_that_is_no_log_is_left_as_it_is(tmp_path, content):
    path = tmp_path / "bank"
    TaskBank.from_latents(HyperNet(4, 2, 3, 1), torch.randn(6, 4)).save(path)
    log = tmp_path / "bank.log"
    log.write_bytes(content)
    with pytest.raises(BankFileError, match="is not the log of a bank"):
        TaskBank.open(path, log=True)
    assert log.read_bytes() == content
