"""The recipe of personal networks: its data, its gain over what has no latent, its live server."""

import importlib.util

import pytest
import torch

pytest.importorskip("sklearn")

from hyperfast.recipes import personal, personal_model, personal_rivals
from hyperfast.recipes.personal_model import FEW, FOLDERS, accuracy, adapt
from hyperfast.recipes.personal_rivals import HEAD, SPEC

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data():
    return personal_model.load(400, 20)


@pytest.fixture(scope="module")
def sorters(data):
    return personal_model.train(data.known, steps=300)


@pytest.fixture(scope="module")
def latents(data, sorters):
    return adapt(sorters, data.new)


def test_users_sort_ten_digits_each_in_a_way_of_its_own(data):
    assert data.known.images.shape == (400, 100, 64)
    assert data.new.images.shape == (20, FEW, 64)
    assert data.known_held.folders.shape == (400, 500)
    folders = torch.cat([data.known_held.folders, data.new_held.folders])
    assert len(folders.unique(dim=0)) == 420
    assert all(set(row.tolist()) == set(range(FOLDERS)) for row in folders)
    assert len(folders.unique(dim=1).T) == 10  # an image's folder depends on its digit alone


def test_held_out_images_are_in_no_rows_to_learn_from(data):
    def images(users):
        return {tuple(image) for image in users.images.flatten(0, 1).tolist()}

    known, new, held = images(data.known), images(data.new), images(data.new_held)
    assert len(held) == 500
    assert held.isdisjoint(known | new)
    assert known.isdisjoint(new)


def test_the_seed_decides(data):
    again, other = personal_model.load(400, 20), personal_model.load(400, 20, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(again.new, data.new, strict=True))
    assert not torch.equal(other.new.folders, data.new.folders)
    a, b = (personal_model.train(data.known, steps=3).latents.weight for _ in range(2))
    assert torch.equal(a, b)


def test_adapting_leaves_the_hypernetwork_and_other_users_alone(data, sorters, latents):
    before = {name: value.clone() for name, value in sorters.state_dict().items()}
    alone = personal_model.Users(*(part[3:4] for part in data.new))
    torch.testing.assert_close(adapt(sorters, alone), latents[3:4], rtol=1e-2, atol=1e-2)
    assert all(torch.equal(before[name], v) for name, v in sorters.state_dict().items())


def test_a_fitted_latent_gains_over_one_network_and_over_few_rows_alone(data, sorters, latents):
    new, held = data.new, data.new_held
    ours = accuracy(sorters(held.images, latents), held)
    alone = personal_rivals.best_fit(
        personal_rivals.fresh(20), new, held, free=SPEC.numel, steps=100
    )
    assert alone > 0.7  # a rival that learns nothing proves nothing
    assert ours > alone + 0.05
    assert ours > personal_rivals.ceiling(held) + 0.3


def test_the_ceiling_bounds_any_single_network(data):
    """Also one that knows how the new users sort, from 500 images each."""
    held = data.new_held
    flat = personal_rivals.train(held, own_heads=False, steps=100)
    with torch.no_grad():
        shared = accuracy(personal_rivals.run(held.images, flat), held)
    assert 1 / FOLDERS < shared <= personal_rivals.ceiling(held) < 0.5
    same = personal_model.Users(*(part[:1].expand(5, *part.shape[1:]) for part in held))
    assert personal_rivals.ceiling(same) == 1


def test_heads_of_their_own_learn_the_known_users(data):
    flat = personal_rivals.train(data.known, own_heads=True, steps=300)
    assert len(flat[:, :-HEAD].unique(dim=0)) == 1
    with torch.no_grad():
        scores = personal_rivals.run(data.known_held.images, flat)
    assert accuracy(scores, data.known_held) > 0.8


def test_a_head_is_fitted_alone(data, monkeypatch):
    seen = []
    run = personal_rivals.run
    monkeypatch.setattr(personal_rivals, "run", lambda x, flat: seen.append(flat) or run(x, flat))
    start = personal_rivals.fresh(20)
    personal_rivals.best_fit(start, data.new, data.new_held, free=HEAD, steps=3)
    assert all(torch.equal(flat[:, :-HEAD], start[:, :-HEAD]) for flat in seen)
    assert not torch.equal(seen[-1][:, -HEAD:], start[:, -HEAD:])


def test_new_users_are_served_by_their_networks(data, sorters, latents):
    scores, stats = personal.serve_new(sorters, data)
    torch.testing.assert_close(scores, sorters(data.new_held.images, latents), rtol=0.01, atol=0.01)
    assert stats.failed == stats.cancelled == stats.waiting == 0
    assert stats.done > 20 + 4  # the new users' requests, and some of the known ones'


def test_int8_agrees(data, sorters):
    assert personal.agreement(sorters, sorters.latents.weight, data.known_held) >= 0.99


def test_main_says_what_it_found(data, sorters, monkeypatch, capsys):
    monkeypatch.setattr(personal, "load", lambda known, new: data)
    monkeypatch.setattr(personal, "train", lambda users, steps: sorters)
    compare = personal.compare
    monkeypatch.setattr(personal, "compare", lambda data, *_: compare(data, 5, 5))
    assert personal.main(["--quick"]) == 0
    said = capsys.readouterr().out
    for word in ("Synthetic: 400 users", "served", "shared network", "agree on", "p99", "0 failed"):
        assert word in said


def test_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        personal.main([])
    assert "pip install 'hyperfast[demo]'" in capsys.readouterr().err
