import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    """Ops this small gain nothing from more, and on a busy machine wait long for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def recorded(monkeypatch):
    """``recorded(module, name)``: the list of what a function of it returns from now on."""

    def record(module, name):
        results, run = [], getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, **k: results.append(run(*a, **k)) or results[-1]
        )
        return results

    return record
