"""torch.export of a model and of a bank, and a package by AOTInductor that runs in a process which
knows the registered ops and nothing of the model."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.export import Dim
from torch.utils._python_dispatch import TorchDispatchMode

import hyperfast
from hyperfast import HyperMLP, HyperNet, TargetNet, TaskBank
from tests.support.budget import assert_as_good, close

# PyTorch's own: modules of its compiler still use torch.jit, and its pytrees what they deprecate.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),
]


def make_bank(**kwargs):
    """Its ids are not the numbers of its rows: some have been removed, and their slots reused."""
    hyper = HyperNet(5, 4, (8, 7), 3, target_activation="tanh", dtype=kwargs.pop("of", None))
    bank = TaskBank.from_latents(hyper, torch.randn(9, 5, dtype=hyper.head.weight.dtype), **kwargs)
    bank.remove([2, 5, 8])
    bank.add(torch.randn(2, 5, dtype=hyper.head.weight.dtype))
    bank.update([3], torch.randn(1, 5, dtype=hyper.head.weight.dtype))
    return bank


def rows_of(bank, count, dtype=torch.float32):
    ids = bank.ids()
    return torch.randn(count, 4).to(dtype), ids[torch.randint(len(ids), (count,))]


# The module of a bank


KINDS = {
    "fp32": {},
    "fp64": {"of": torch.float64},
    "bf16": {"dtype": torch.bfloat16},
    "int8": {"dtype": torch.int8},
}


@pytest.mark.parametrize("kind", KINDS)
def test_module_of_a_bank(kind):
    bank = make_bank(**KINDS[kind])
    x, ids = rows_of(bank, 40)
    module, y = bank.module(), bank(x, ids)
    close(module(x, ids), y, 1e-6)
    bank.remove(ids.unique())  # which the module does not see
    close(module(x, ids), y, 1e-6)


def test_module_of_a_bank_that_generates():
    """Module and bank make the weights of latents by other ops, each with its own rounding."""
    bank = make_bank(max_bytes=2000)
    x, ids = rows_of(bank, 40)
    with hyperfast.use_backend("reference"):
        plain = bank(x, ids)
    latents, hyper = bank.latents(ids).double(), copy.deepcopy(bank.hyper).double()
    exact = TargetNet("tanh")(x.double().unsqueeze(1), hyper(latents)).squeeze(1)
    module = bank.module()
    for y in (bank(x, ids), module(x, ids)):
        assert_as_good(y, plain, exact)
    bank.remove(ids.unique())  # which the module does not see
    assert_as_good(module(x, ids), plain, exact)


@pytest.mark.parametrize("bad", [2, 8, 9, -1, -(2**32), 2**40, 2**62, 2**63 - 1, 2**31])
def test_module_refuses_ids_that_the_bank_does(bad):
    bank = make_bank()
    x, ids = rows_of(bank, 5)
    ids[3] = bad
    for refused in (bank, bank.module()):
        with pytest.raises(IndexError, match=f"no task of the bank has the id {bad}$"):
            refused(x, ids)


def test_module_reads_no_number():
    """Which would wait for all that runs on a GPU: the op refuses an id, and then it is named."""

    class Reads(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **kwargs or {})

    bank = make_bank()
    (x, ids), module = rows_of(bank, 5), bank.module()
    with Reads() as reads:
        module(x, ids)
    assert not reads.seen
    ids[3] = 8
    with reads, pytest.raises(IndexError):
        module(x, ids)
    assert reads.seen


def test_module_checks_what_it_is_given():
    module = make_bank().module()
    x, ids = rows_of(make_bank(), 5)
    for args, error, message in (
        ((x.numpy(), ids), TypeError, "x must be a Tensor, got ndarray"),
        ((x.long(), ids), TypeError, "x must be a floating-point tensor"),
        ((x[:, 1:], ids), ValueError, r"x must have shape \(R, "),
        ((x, ids.int()), TypeError, "task_ids must have dtype torch.int64"),
        ((x, ids[1:]), ValueError, r"task_ids must have shape \(5,\)"),
        ((x, ids.tolist()), TypeError, "task_ids must be a Tensor, got list"),
        ((x.to("meta"), ids), ValueError, "x must be on the device of the bank, cpu, got meta"),
    ):
        with pytest.raises(error, match=message):
            module(*args)


def test_module_of_an_empty_bank():
    bank = TaskBank.from_latents(HyperNet(5, 4, 8, 3), torch.randn(0, 5))
    module = bank.module()
    assert module(torch.randn(0, 4), torch.empty(0, dtype=torch.int64)).shape == (0, 3)
    with pytest.raises(IndexError):
        module(torch.randn(1, 4), torch.tensor([0]))


# Export


class Service(torch.nn.Module):
    """A model that generates networks, and a bank of stored ones, in one program."""

    def __init__(self, model, bank):
        super().__init__()
        self.model, self.bank = model, bank

    def forward(self, x, z, rows, ids):
        return self.model(x, z), self.bank(rows, ids)


def make_service():
    torch.manual_seed(0)
    bank = make_bank(of=torch.float64)
    return Service(HyperMLP(bank.hyper), bank.module()), bank


def inputs(bank, tasks, rows):
    x, z = torch.randn(tasks, rows, 4).double(), torch.randn(tasks, 5).double()
    return x, z, *rows_of(bank, tasks * rows, torch.float64)


SIZES = [(3, 2), (2, 5), (33, 9)]


@pytest.fixture(scope="module")
def exported():
    service, bank = make_service()
    tasks, rows, mixed = Dim("tasks"), Dim("rows"), Dim("mixed")
    shapes = {0: tasks, 1: rows}, {0: tasks}, {0: mixed}, {0: mixed}
    with torch.no_grad():
        return torch.export.export(service, inputs(bank, 3, 2), dynamic_shapes=shapes)


def calls(program):
    return [n for n in program.graph.nodes if getattr(n.target, "namespace", "") == "hyperfast"]


def test_export_calls_the_registered_ops(exported):
    assert len(calls(exported)) >= 2  # one of the model and one of the bank, at the least


def test_export_is_saved_and_loaded(exported, tmp_path):
    torch.export.save(exported, tmp_path / "service.pt2")
    again = torch.export.load(tmp_path / "service.pt2")
    service, bank = make_service()
    assert len(calls(again)) == len(calls(exported))
    for size in SIZES:
        args = inputs(bank, *size)
        close(again.module()(*args), service(*args))


# Run by a process of its own. What it knows of hyperfast is that it has ops.
CLIENT = """
import sys, torch
package, folder = sys.argv[1:]
try:
    torch._inductor.aoti_load_package(package)
except RuntimeError as error:
    print("without the ops:", error)
import hyperfast.ops
service = torch._inductor.aoti_load_package(package)
*cases, bad = torch.load(f"{folder}/inputs")
with torch.no_grad(), torch.profiler.profile() as profile:
    outputs = [service(*args) for args in cases]
print("calls:", *{event.name for event in profile.events() if "hyperfast::" in event.name})
try:
    service(*bad)
except RuntimeError as error:
    print("with a bad id:", error)
torch.save(outputs, f"{folder}/outputs")
"""


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler")
def test_package_runs_without_the_model(exported, tmp_path):
    package = str(tmp_path / "service.pt2")
    torch._inductor.aoti_compile_and_package(exported, package_path=package)
    service, bank = make_service()
    cases = [inputs(bank, *size) for size in SIZES]
    *bad, ids = inputs(bank, 2, 2)
    bad.append(torch.full_like(ids, 2))  # has been removed
    torch.save([*cases, bad], tmp_path / "inputs")
    root = str(Path(hyperfast.__file__).parents[1])
    client = subprocess.run(
        [sys.executable, "-c", CLIENT, package, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert client.returncode == 0, client.stderr
    said = client.stdout
    assert "without the ops: Could not find schema for hyperfast::" in said
    assert {n.target.name().partition(".")[0] for n in calls(exported)} <= set(said.split())
    assert "with a bad id: IndexError: task_ids must be in" in said
    outputs = torch.load(tmp_path / "outputs")
    assert len(outputs) == len(SIZES)
    for args, got in zip(cases, outputs, strict=True):
        close(tuple(got), service(*args))
