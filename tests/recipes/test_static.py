"""Generated kernels: what they reach, with how many numbers, and their picture."""

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from hyperfast.recipes import static
from hyperfast.recipes.static import HELD_OUT, NETWORKS

pytestmark = pytest.mark.usefixtures("one_thread")


def parameters(net):
    return sum(p.numel() for p in net.parameters())


def test_main_learns_generated_kernels_and_draws_them(recorded, tmp_path, capsys):
    from matplotlib.image import imread

    found = recorded(static, "accuracy")
    assert static.main(["--quick", "--out", str(tmp_path / "a.png")]) == 0
    own, generated, narrow = torch.tensor(found).view(2, 3).mean(0).tolist()
    assert own > 0.95
    assert generated > 0.92  # a generator that does not learn reaches 0.82
    assert narrow > 0.92
    said = capsys.readouterr().out
    for name, score in zip(NETWORKS, (own, generated, narrow), strict=True):
        (line,) = (line for line in said.splitlines() if line.startswith(f"  {name}  "))
        assert f"{100 * score:.2f} +-" in line
    assert "71,424 numbers of kernels come of 7,301, 31 embeddings among them" in said
    image = imread(tmp_path / "a.png")[..., :3]
    top, bottom = image[: len(image) // 2], image[len(image) // 2 :]
    assert min(top.std(), bottom.std()) > 0.05


def test_all_kernels_behind_the_first_are_generated():
    own, generated, narrow = (make() for make in NETWORKS.values())
    kernels = [name for name, p in own.named_parameters() if p.ndim > 2]
    assert [*generated.weights()] == kernels[1:]
    assert "target.net.0.weight" in generated.state_dict()
    assert parameters(generated) < parameters(own) / 8
    assert 0.8 < parameters(narrow) / parameters(generated) <= 1


def test_the_seed_decides_what_is_held_out():
    data, other = static.load(0), static.load(1)
    assert data.x_held.shape == (HELD_OUT, 1, 8, 8)
    seen = {tuple(image) for image in data.x.flatten(1).tolist()}
    assert len(seen) == len(data.x) == 1797 - HELD_OUT
    assert seen.isdisjoint(map(tuple, data.x_held.flatten(1).tolist()))
    assert not torch.equal(data.x, other.x)


def test_the_picture_shows_the_kernels_of_both():
    plain, generated = static.own(), static.generated()
    figure = static.picture(plain, generated)
    first = figure.axes[0].images[0].get_array()
    assert torch.equal(torch.as_tensor(first[4:7, 8:11]), plain[3].weight[1, 2].detach())
    below = figure.axes[6].images[0].get_array()  # of the second layer that is generated
    expected = generated.weights()["6.weight"][3, 1].detach()
    assert torch.equal(torch.as_tensor(below[12:15, 4:7]), expected)


def test_unusable_out_is_refused_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(static, "load", lambda seed: pytest.fail("went on to work"))
    with pytest.raises(SystemExit):
        static.main(["--out", str(tmp_path / "a.jpg")])
    assert "--out must end in .png" in capsys.readouterr().err
