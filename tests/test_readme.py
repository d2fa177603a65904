"""README is short and its code runs; no link of a page is dead."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in (".", "bench", "csrc", "hyperfast/bank")
    for path in (ROOT / folder).glob("*.md")
)


def test_a_reader_has_a_minute():
    assert README.count("\n") <= 100
    choices = README.partition("## Choose")[2].partition("\n## ")[0]
    assert choices.count("\n| ") - 1 <= 8  # less the header


def test_code_runs_and_before_equals_after():
    names = {}
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.S):
        exec(block, names)
    assert names["y"].shape == (500, 1)
    parameters = list(names["hyper"].parameters())
    before, after = names["generate"], names["hyper"].generator
    gradients = [p.grad.clone() for p in parameters]
    before.load_state_dict(after.state_dict())
    y = names["networks"](names["x"], names["z"])
    torch.testing.assert_close(y, names["model"](names["x"], names["z"]), rtol=1e-4, atol=1e-5)
    y.square().mean().backward()
    for p, gradient in zip(before.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    file = ROOT / page
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", file.read_text())
    assert not [a for a in links if "://" not in a and not (file.parent / a).exists()]
