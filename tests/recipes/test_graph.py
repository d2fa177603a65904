"""The graphs, what is learned of them with and without their bonds, and the rival's formula."""

import pytest
import torch

pytest.importorskip("tqdm")

from hyperfast.recipes import graph, graph_rival
from hyperfast.recipes.graph import KINDS, MOST_BONDS, convolution, draw

pytestmark = pytest.mark.usefixtures("one_thread")


def test_seeing_bonds_explains_what_a_blind_network_cannot(recorded, capsys):
    found = recorded(graph, "unexplained")
    assert graph.main(["--quick"]) == 0
    seeing, blind = found
    assert seeing < 0.12
    assert 0.5 < blind < 0.9  # it knows elements and the number of bonds
    said = capsys.readouterr().out
    for word in ("1,000 synthetic graphs", "formula", "kept for the gradients"):
        assert word in said


def test_graphs_are_as_large_as_molecules_and_connected():
    count = 100
    graphs = draw(count, seed=0)
    source, to = graphs.bonds
    atoms = len(graphs.element)
    assert 17 < atoms / count < 19
    assert 34 < len(to) / count < 39
    degrees = to.bincount(minlength=atoms)
    assert degrees.min() == 1
    assert degrees.max() == MOST_BONDS
    assert len(graphs.bonds.unique(dim=1).T) == len(to)
    label = torch.arange(atoms)
    for _ in range(24):
        label = label.scatter_reduce(0, to, label[source], "amin")
    assert len(label.unique()) == count


def test_a_bond_has_one_kind_and_acts_both_ways():
    graphs = draw(20, seed=0)
    half = len(graphs.features) // 2
    assert torch.equal(graphs.bonds[:, :half], graphs.bonds[:, half:].flip(0))
    assert torch.equal(graphs.features[:half], graphs.features[half:])
    assert (graphs.features[:, :KINDS].sum(1) == 1).all()


def test_all_seeds_share_one_law_of_energies():
    """Of atoms with one bond: the same elements and kind have the same stiffness."""
    stiffness = {}
    for seed in range(2):
        graphs = draw(100, seed)
        _, to = graphs.bonds
        for edge in (to.bincount()[to] == 1).nonzero().flatten().tolist():
            ends = frozenset(graphs.element[graphs.bonds[:, edge]].tolist())
            strain = graphs.features[edge, KINDS]
            if strain.abs() > 0.1:
                found = (graphs.energy[to[edge]] / strain.square()).item()
                key = ends, graphs.features[edge, :KINDS].argmax().item()
                assert stiffness.setdefault(key, found) == pytest.approx(found, rel=1e-4)
    assert len(stiffness) == KINDS * 15  # pairs of five elements


def test_the_formula_is_the_convolution():
    torch.manual_seed(0)
    graphs = draw(5, seed=0)
    conv = convolution(8, 16)
    x = torch.randn(len(graphs.element), 8)
    expected = conv(x, graphs.bonds, graphs.features)
    torch.testing.assert_close(graph_rival.stored(conv, x, graphs.bonds, graphs.features), expected)


def test_race_refuses_a_rival_that_finds_something_else(monkeypatch):
    graphs = draw(5, seed=0)
    monkeypatch.setattr(graph_rival, "stored", lambda conv, *args: 2 * conv(*args))
    with pytest.raises(AssertionError):
        graph_rival.race(convolution(8, 16), graphs.bonds, graphs.features, rounds=1)
