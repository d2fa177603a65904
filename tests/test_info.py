"""``python -m hyperfast info``: it says what is so."""

import re

import pytest
import torch

import hyperfast
from hyperfast.__main__ import main
from hyperfast.info import report
from hyperfast.ops import backends
from hyperfast.ops.define import CPU_OPS, OPS


def test_versions_and_threads():
    text = report()
    assert re.search(rf"^hyperfast +{re.escape(hyperfast.__version__)}$", text, flags=re.M)
    assert re.search(rf"^torch +{re.escape(torch.__version__)}$", text, flags=re.M)
    assert f"{torch.get_num_threads()} threads" in text


@pytest.mark.parametrize("backend", backends.KEYS)
def test_a_backend_is_built_or_missing_with_its_reason(backend):
    (line,) = re.findall(rf"^{backend} +(?:built|missing).*$", report(), flags=re.M)
    reason = backends.why_missing(backend)
    assert ("built" in line) == (not reason)
    assert not reason or reason.splitlines()[0] in report()


def test_every_op_has_a_line_of_what_runs_it():
    text = report()
    for op in (*OPS, *CPU_OPS):
        (line,) = re.findall(rf"^{op} .*$", text, flags=re.M)
        assert ("cpp" in line) == backends.has_kernel("cpp", op)


def test_a_build_that_is_not_here_is_told_by_name(monkeypatch):
    if backends.why_missing("cpp"):
        pytest.skip(backends.why_missing("cpp"))
    from hyperfast import _C

    assert f"built, kernels for {_C.isa()}" in report()

    def elsewhere():
        raise ValueError("no such build")

    monkeypatch.setattr(_C, "isa", elsewhere)
    assert "built, but cannot run: no such build" in report()


def test_the_command_prints_it_and_takes_no_options(capsys):
    assert main(["info"]) == 0
    assert capsys.readouterr().out == report() + "\n"
    with pytest.raises(SystemExit) as exit:
        main(["info", "--verbose"])
    assert exit.value.code == 2
