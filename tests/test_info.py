"""``python -m hyperfast info``: it says what is so."""

import re

import pytest
import torch

import hyperfast
from hyperfast import info
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


@pytest.fixture
def ptxas(tmp_path, monkeypatch):
    """Makes Triton's assembler a script that says it is of this release."""
    pytest.importorskip("triton")

    def install(release, variable="TRITON_PTXAS_PATH"):
        file = tmp_path / f"ptxas-{release}"
        file.write_text(
            "#!/bin/sh\n"
            'echo "ptxas: NVIDIA (R) Ptx optimizing assembler"\n'
            f'echo "Cuda compilation tools, release {release}, V{release}.20"\n'
        )
        file.chmod(0o755)
        monkeypatch.setenv(variable, str(file))
        return str(file)

    return install


HOPPER, ADA, BLACKWELL = (9, 0), (8, 9), (10, 0)


@pytest.mark.parametrize(
    ("release", "devices", "warned"),
    [
        ("12.8", [HOPPER], True),
        ("13.2", [ADA, HOPPER], True),
        ("13.3", [HOPPER], False),
        ("13.10", [HOPPER], False),
        ("12.8", [ADA, BLACKWELL], False),
        ("12.8", [], False),
    ],
)
def test_the_assembler_and_a_warning_where_it_errs(ptxas, monkeypatch, release, devices, warned):
    path = ptxas(release)
    monkeypatch.setattr(info, "_capabilities", lambda: devices)
    lines = [line for line in report().splitlines() if line.startswith("ptxas ")]
    assert f"ptxas        {release}, {path}" in lines
    assert ("warning: before release 13.3" in report()) == warned


def test_later_devices_have_an_assembler_of_their_own(ptxas, monkeypatch):
    old, new = ptxas("12.8"), ptxas("13.4", "TRITON_PTXAS_BLACKWELL_PATH")
    monkeypatch.setattr(info, "_capabilities", lambda: [BLACKWELL])
    assert f"ptxas        13.4, {new}" in report()
    assert old not in report()


def test_on_rocm_no_assembler_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ptxas" not in report()


def test_without_triton_no_assembler_is_named(monkeypatch):
    monkeypatch.setattr(info, "HAS_TRITON", False)
    assert "ptxas" not in report()


def test_the_command_prints_it_and_takes_no_options(capsys):
    assert main(["info"]) == 0
    assert capsys.readouterr().out == report() + "\n"
    with pytest.raises(SystemExit) as exit:
        main(["info", "--verbose"])
    assert exit.value.code == 2
