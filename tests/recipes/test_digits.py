"""The demo: its parts, its promise on held-out pixels, its files, its errors."""

import importlib.util

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from hyperfast.recipes import digits as demo
from hyperfast.recipes import digits_model, digits_picture, digits_rivals


@pytest.fixture(scope="module")
def digits():
    return digits_model.load_digits()


@pytest.fixture(scope="module")
def few(digits):
    return digits_model.Digits(*(t[:70] for t in digits))


@pytest.fixture(scope="module")
def fields(few):
    return digits_model.train(few, epochs=2).requires_grad_(False)


def test_psnr_of_a_known_error():
    truth = torch.rand(3, 64)
    assert digits_model.psnr(truth + 0.1, truth) == pytest.approx(20, abs=1e-4)


def test_mask_hides_the_same_number_of_pixels_everywhere_and_other_ones():
    mask = digits_model.keep_mask((50, 64), 0.25, seed=0)
    assert mask.dtype == torch.bool
    assert (mask.sum(1) == 48).all()
    assert len(mask.unique(dim=0)) == 50
    assert torch.equal(mask, digits_model.keep_mask((50, 64), 0.25, seed=0))
    assert not torch.equal(mask, digits_model.keep_mask((50, 64), 0.25, seed=1))


def test_digits_are_shares_of_ink(digits):
    assert digits.pixels.shape == digits.kept.shape == (1797, 64)
    assert (digits.pixels.amin(), digits.pixels.amax()) == (0, 1)


@pytest.mark.parametrize("per_pixel", [1, 2, 3])
def test_points_of_a_pixel_lie_around_its_centre(per_pixel):
    points = digits_model.grid(4, per_pixel).unflatten(0, (16, -1))
    axis = torch.tensor([-0.75, -0.25, 0.25, 0.75])
    centres = torch.cartesian_prod(axis, axis).flip(1)  # x runs fastest
    torch.testing.assert_close(points.mean(1), centres)
    assert ((points - centres.unsqueeze(1)).abs() < 0.25).all()
    assert len(points.flatten(0, 1).unique(dim=0)) == 16 * per_pixel**2


def test_a_pixel_is_the_mean_of_what_is_drawn_in_it(fields):
    z = fields.latents.weight
    drawn = fields.draw(z)
    assert drawn.shape == (70, 32, 32)
    means = torch.nn.functional.avg_pool2d(drawn, 4).flatten(1)
    torch.testing.assert_close(fields.pixels(z), means)


def test_held_out_pixels_have_no_influence(few):
    other = few._replace(pixels=few.pixels.where(few.kept, 1 - few.pixels))
    a, b = (digits_model.train(d, epochs=1).state_dict() for d in (few, other))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_seed_decides(few, fields):
    again = digits_model.train(few, epochs=2).latents.weight
    assert torch.equal(again, fields.latents.weight)
    other = digits_model.train(few, epochs=2, seed=1).latents.weight
    assert not torch.equal(other, again)


def test_short_training_beats_interpolation(digits):
    trained = digits_model.train(digits, epochs=12).requires_grad_(False)
    hidden = ~digits.kept

    def score(images):
        return digits_model.psnr(images[hidden], digits.pixels[hidden])

    rivals = [
        score(digits_rivals.interpolate(m, digits))
        for m in (digits_rivals.bicubic, digits_rivals.radial)
    ]
    assert score(trained.pixels(trained.latents.weight)) > max(rivals) + 1.5


def test_rivals_draw_the_same(fields):
    points = digits_model.grid(9)
    expected = fields(points, fields.latents.weight)
    for rival in (digits_rivals.loop, digits_rivals.bmm):
        torch.testing.assert_close(rival(fields, points), expected)


def test_race_refuses_a_rival_that_draws_something_else(fields, monkeypatch):
    monkeypatch.setattr(digits_rivals, "bmm", lambda f, points: 1 - digits_rivals.loop(f, points))
    with pytest.raises(AssertionError):
        digits_rivals.race(fields, rounds=1)


@pytest.mark.parametrize(
    ("method", "tolerance"), [(digits_rivals.bicubic, 1e-6), (digits_rivals.radial, 0.05)]
)
def test_interpolation_is_good_where_the_image_is_smooth(few, method, tolerance):
    ramp = (digits_model.grid(8) @ torch.tensor([0.2, 0.1]) + 0.5).expand(70, -1)
    images = digits_rivals.interpolate(method, few._replace(pixels=ramp))
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[2:6, 2:6] = True
    torch.testing.assert_close(
        images[:, inside.flatten()], ramp[:, inside.flatten()], rtol=0, atol=tolerance
    )


def test_neighbours_change_held_out_pixels_only(few):
    filled = digits_rivals.neighbours(few)
    assert torch.equal(filled[few.kept], few.pixels[few.kept])
    assert filled.isfinite().all()
    assert digits_model.psnr(filled[~few.kept], few.pixels[~few.kept]) > 10


def test_saved_model_draws_the_same_bit_for_bit(fields, tmp_path):
    path = tmp_path / "model.safetensors"
    digits_model.save(fields, path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    again = digits_model.load(path)
    assert again.sizes == fields.sizes
    assert torch.equal(again.draw(again.latents.weight), fields.draw(fields.latents.weight))


def test_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(tmp):
        tmp.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        digits_model.replace(path, fail)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


def test_square_of_latents_has_its_corners_and_keeps_their_length():
    corners = torch.nn.functional.normalize(torch.randn(4, 8)) * 3
    square = digits_picture.square(corners, 5)
    assert square.shape == (25, 8)
    torch.testing.assert_close(square[[0, 4, 20, 24]], corners)
    torch.testing.assert_close(square.norm(dim=1), torch.full((25,), 3.0))


def test_mosaic_puts_images_in_rows():
    images = torch.arange(1.0, 6).view(5, 1, 1).expand(5, 2, 2)
    wall = digits_picture.mosaic(images, columns=3, gap=1)
    assert wall.shape == (6, 9)
    assert wall[::3, ::3].tolist() == [[1, 2, 3], [4, 5, 0]]
    assert (wall[2] == 0).all()


def test_main_writes_picture_and_model(few, tmp_path, monkeypatch, capsys):
    from matplotlib.image import imread

    monkeypatch.setattr(demo, "load_digits", lambda: few)
    assert demo.main(["--quick", "--out", str(tmp_path / "a.png")]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "a.safetensors"]
    image = imread(tmp_path / "a.png")
    expected = [
        round(s * digits_picture.DPI) for s in (digits_picture.HEIGHT, digits_picture.WIDTH)
    ]
    assert image.shape[:2] == pytest.approx(expected, abs=1)
    top, bottom = image[: len(image) // 2, :, :3], image[len(image) // 2 :, :, :3]
    assert top.std() > 0.05
    assert bottom.std() > 0.02
    said = capsys.readouterr().out
    for word in ("bicubic", "loop", "bmm", "times fewer", "bit for bit", "70 digits"):
        assert word in said


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("missing/a.png", "folder that exists"),
        ("a.jpg", "must end in .png"),
        ("folder.png", "must be a file"),
    ],
)
def test_unusable_out_is_refused_before_training(out, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(demo, "load_digits", lambda: pytest.fail("went on to work"))
    with pytest.raises(SystemExit) as exit_:
        demo.main(["--out", str(tmp_path / out)])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_extras_are_named(tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "sklearn" else find(name)
    )
    with pytest.raises(SystemExit):
        demo.main(["--out", str(tmp_path / "a.png")])
    error = capsys.readouterr().err
    assert "scikit-learn not found" in error
    assert "pip install 'hyperfast[demo]'" in error
