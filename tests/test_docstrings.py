"""Every public name shows how it is used, and what its examples show is so."""

import doctest
import inspect

import pytest
import torch
import torch.distributed as dist

import hyperfast
from hyperfast import distributed, functional, nets

PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in (hyperfast, functional, nets)
    for name in module.__all__
    if not inspect.ismodule(getattr(module, name))
} | {"hyperfast.distributed.parallelize": distributed.parallelize}
# Methods that make things in a way of their own.
PUBLIC |= {"hyperfast.HyperNet.for_module": hyperfast.HyperNet.for_module}


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    """Of one process: for what works under torchrun."""
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", PUBLIC)
def test_examples(name):
    """Of the name itself and of its methods; torch and hyperfast are imported for them."""
    names = {"torch": torch, "hyperfast": hyperfast}
    found = doctest.DocTestFinder(recurse=True).find(PUBLIC[name], name, globs=names)
    assert any(t.examples and t.name == name for t in found), f"{name} has no example"
    said = []
    for t in found:
        doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(t, out=said.append)
    assert not said, "".join(said)
