"""``distributed_checks`` on two processes under torchrun and on four that are spawned; and what
needs no other process."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.multiprocessing

from hyperfast import ShardedTaskBank
from hyperfast.bank.file import BankFileError
from hyperfast.distributed.folder import MANIFEST, Manifest
from hyperfast.distributed.ranks import owner
from tests.distributed import distributed_checks


def torchrun(folder):
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*run, distributed_checks.__file__, folder]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    return done.stderr


def spawn(folder):
    try:
        torch.multiprocessing.start_processes(
            distributed_checks.spawned, (4, folder), nprocs=4, start_method="forkserver"
        )
    except torch.multiprocessing.ProcessException as error:
        return str(error)
    return ""


@pytest.fixture(scope="module", params=[torchrun, spawn], ids=["torchrun-2", "spawned-4"])
def outcome(request, tmp_path_factory):
    """Names of the checks that have passed, and what was said if one has not."""
    folder = tmp_path_factory.mktemp("group")
    said = request.param(str(folder))
    passed = folder / "passed"
    return passed.read_text().split() if passed.exists() else [], said


@pytest.mark.parametrize("check", distributed_checks.CHECKS)
def test_group(outcome, check):
    passed, said = outcome
    assert check in passed, said


# Owners


def test_owners_are_those_of_the_published_hash():
    """SplitMix64 in Python's own integers: the owners of a saved bank must never change."""

    def mix(h):
        h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) % 2**64
        return (h ^ (h >> 31)) % 2**63

    ids = [0, 1, 2, 3, 17, 12345, 2**32 - 1, 2**61 + 5, 2**62, 2**63 - 1]
    for ranks in (1, 2, 3, 4, 1000):
        assert owner(torch.tensor(ids), ranks).tolist() == [mix(n) % ranks for n in ids]


@pytest.mark.parametrize("step", [1, 2, 1000, 2**32])
def test_owners_share_evenly(step):
    counts = owner(torch.arange(10_000) * step, 4).bincount()
    assert counts.min() > 2300  # of 2500: 4.6 standard deviations
    assert counts.max() < 2700


# The manifest


@pytest.fixture
def folder(tmp_path):
    Manifest.new(77, 2, 5, 9).write(tmp_path)
    return tmp_path


def test_manifest_comes_back(folder):
    manifest = Manifest.read(folder)
    assert manifest == Manifest.new(77, 2, 5, 9)
    assert manifest.files == [f"{77:016x}.{n}-of-2.safetensors" for n in range(2)]
    assert [path.name for path in folder.iterdir()] == [MANIFEST]


def test_a_damaged_manifest_is_refused(folder):
    """Every byte of it changed, and every cut of it; or what it says is not changed by that."""
    right = (folder / MANIFEST).read_bytes()
    for n in range(len(right)):
        for wrong in (right[:n], right[:n] + bytes([right[n] ^ 1]) + right[n + 1 :]):
            (folder / MANIFEST).write_bytes(wrong)
            try:
                assert Manifest.read(folder) == Manifest.new(77, 2, 5, 9)
            except BankFileError:
                continue
            assert wrong.split() != right.split()  # white space


@pytest.mark.parametrize(
    "wrong",
    [b"", b"\xff", b"[]", b"{}", b"null", b"[" * 100_000, {"files": ["../b.safetensors"]}],
    ids=["empty", "binary", "list", "dict", "null", "deep", "path"],
)
def test_a_foreign_manifest_is_refused(folder, wrong):
    if isinstance(wrong, dict):
        manifest = Manifest(**wrong, tasks=5, issued=9)
        manifest.write(folder)
    else:
        (folder / MANIFEST).write_bytes(wrong)
    with pytest.raises(BankFileError, match="is not a manifest, or is damaged"):
        Manifest.read(folder)


def test_a_manifest_of_another_format_is_refused(folder):
    entries = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(entries | {"format": "hyperfast.ShardedTaskBank/2"}))
    with pytest.raises(BankFileError, match="is not a manifest"):
        Manifest.read(folder)


def test_without_a_process_group(tmp_path):
    with pytest.raises(ValueError, match="process group has not been initialized"):
        ShardedTaskBank.open(tmp_path)


def test_import_of_the_package_imports_no_dtensor():
    code = "import sys, torch; a = set(sys.modules); import hyperfast; print(*set(sys.modules) - a)"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    imported = done.stdout.split()
    assert "hyperfast.distributed.sharded_bank" in imported
    assert not [name for name in imported if name.startswith("torch.distributed")]
