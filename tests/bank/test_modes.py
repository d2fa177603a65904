"""Who may read a bank's files: what takes the place of a file is as open to others as it was, and
is never more open on its way there."""

import os
import stat

import pytest
import torch

from hyperfast import HyperNet, TaskBank
from hyperfast.bank import file as bank_file

pytestmark = pytest.mark.skipif(os.name != "posix", reason="modes are those of POSIX")


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


@pytest.fixture(params=[0o022, 0o000, 0o077], ids="umask {:03o}".format)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.fixture
def hyper():
    return HyperNet(5, 4, 8, 3)


@pytest.fixture
def bank(hyper):
    return TaskBank.from_latents(hyper, torch.zeros(6, 5))


@pytest.fixture
def watched(monkeypatch, tmp_path):
    """The modes of all files in the folder, at every system call that could change or fill one."""
    seen = {}

    def watch(name):
        call = getattr(os, name)

        def watching(*args, **kwargs):
            result = call(*args, **kwargs)
            for path in tmp_path.iterdir():
                seen.setdefault(path.name, set()).add(mode(path))
            return result

        monkeypatch.setattr(bank_file.os, name, watching)

    for name in ("open", "replace", "fsync", "fchmod", "fchown"):
        watch(name)
    write = bank_file.OwnFile.write

    def writing(file, data):
        write(file, data)
        for path in tmp_path.iterdir():
            seen.setdefault(path.name, set()).add(mode(path))

    monkeypatch.setattr(bank_file.OwnFile, "write", writing)
    return seen


def test_new_files_follow_the_umask(bank, tmp_path, umask, watched):
    path = tmp_path / "b"
    bank.save(path)
    assert mode(path) == 0o666 & ~umask
    TaskBank.open(path, log=True).close()
    assert mode(tmp_path / "b.log") == 0o666 & ~umask | 0o600
    assert set().union(*watched.values()) <= {0o600, 0o666 & ~umask}


@pytest.mark.parametrize("kept", [0o600, 0o640, 0o644, 0o660, 0o400, 0o604])
def test_a_saved_file_and_its_log_keep_their_mode(bank, hyper, tmp_path, umask, watched, kept):
    path, log = tmp_path / "b", tmp_path / "b.log"
    bank.save(path)
    os.chmod(path, kept)
    watched.clear()
    bank.save(path)
    assert mode(path) == kept
    opened = TaskBank.open(path, hyper=hyper, log=True)
    assert mode(log) == kept | 0o600  # its owner writes it, though the bank be read-only
    opened.add(torch.ones(1, 5))
    opened.save(path)
    opened.add(torch.ones(1, 5))
    assert (mode(path), mode(log)) == (kept, kept | 0o600)
    opened.close()
    os.chmod(log, 0o600)
    opened = TaskBank.open(path, hyper=hyper, log=True)
    opened.save(path)  # which cuts the log
    opened.close()
    assert (mode(path), mode(log)) == (kept, 0o600)
    assert len(TaskBank.open(path)) == 8
    for modes in watched.values():
        for one in modes:
            assert one & ~(kept | 0o600) == 0


@pytest.mark.parametrize("left", [0o666, 0o400])
def test_what_a_crash_left_is_not_written_to(bank, tmp_path, left, watched):
    """Who had it open could read on, whatever its mode is now."""
    path, temporary = tmp_path / "b", tmp_path / "b.tmp"
    bank.save(path)
    os.chmod(path, 0o600)
    temporary.write_bytes(b"torn")
    os.chmod(temporary, left)
    watched.clear()
    with open(temporary, "rb") as other:
        bank.save(path)
        assert other.read() == b"torn"
    assert mode(path) == 0o600
    assert not temporary.exists()
    assert len(TaskBank.open(path, verify=True)) == 6


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root")
def test_root_keeps_the_owner(bank, hyper, tmp_path):
    path = tmp_path / "b"
    bank.save(path)
    os.chown(path, 1234, 2345)
    os.chmod(path, 0o640)
    bank.save(path)
    TaskBank.open(path, hyper=hyper, log=True).close()
    for name in ("b", "b.log"):
        found = os.stat(tmp_path / name)
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1234, 2345, 0o640)


def test_another_group_gets_no_more_than_others(bank, tmp_path, monkeypatch):
    """Where a user may not give the file to its group, that group's rights are not its own's."""
    path = tmp_path / "b"
    bank.save(path)
    os.chmod(path, 0o664)
    found = os.stat(path)

    class Another:
        st_mode, st_uid, st_gid = found.st_mode, found.st_uid, found.st_gid + 1

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(bank_file.os, "fchown", refuse)
    with open(tmp_path / "c", "wb") as file:
        bank_file._take_over(file.fileno(), Another, 0)
    assert mode(tmp_path / "c") == 0o644
