"""Files of an earlier release open, and are saved as files are now."""

import shutil

import pytest
import torch

from hyperfast import TaskBank
from tests.bank import old_files


@pytest.fixture(scope="module")
def made():
    banks = old_files.make()
    old_files.log(banks["fp32"])
    return banks


@pytest.mark.parametrize("name", ["fp32", "int8", "no_bias", "budget"])
@pytest.mark.parametrize("log", [False, True])
def test_an_old_file(tmp_path, made, name, log):
    for path in old_files.DATA.glob(f"{name}*"):
        shutil.copy(path, tmp_path)
    path, want = tmp_path / name, made[name]
    hyper = old_files.make_hyper() if name in ("fp32", "budget") else None
    bank = TaskBank.open(path, hyper=hyper, log=log, verify=True)
    for _ in range(2):
        ids = bank.ids()
        assert torch.equal(ids, want.ids())
        assert bank.keys == want.keys
        assert (bank.spec, bank.dtype, bank.max_bytes) == (want.spec, want.dtype, want.max_bytes)
        torch.testing.assert_close(bank.weights(ids), want.weights(ids))
        x = old_files.exact(len(ids), 5, step=43)
        torch.testing.assert_close(bank(x, ids), want(x, ids))
        if hyper is not None:
            given = ids[ids != 1] if name == "fp32" else ids  # by latents
            given = given[: 5 if name == "fp32" else None]
            assert torch.equal(bank.latents(given), want.latents(given))
        bank.save(path)
        bank.close()
        bank = TaskBank.open(path, hyper=hyper, verify=True)
    head = path.read_bytes()[:2000]
    assert b'\\"network\\": \\"5 > 7' in head
    assert b'\\"sizes\\"' not in head
