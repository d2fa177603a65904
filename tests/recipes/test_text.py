"""The two writers: of equal size, on the same text, and what they learn of it."""

import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from hyperfast.recipes import text
from hyperfast.recipes.text import LANES, bits, load, writers

pytestmark = pytest.mark.usefixtures("one_thread")


def test_main_learns_and_names_the_better(recorded, capsys, tmp_path):
    trained = recorded(text, "train")
    assert text.main(["--quick", "--out", str(tmp_path / "curves.png")]) == 0
    (lstm, first), (hyper, second) = trained
    assert abs(lstm.size() - hyper.size()) < 0.02 * hyper.size()
    ends = {"LSTM": first[-1][1], "HyperLSTM": second[-1][1]}
    frequencies = load().held.bincount() / len(load().held)
    alone = -(frequencies * frequencies.clamp(min=1e-9).log2()).sum()
    assert ends["LSTM"] < alone - 0.7  # knowing how frequent every character is
    # By 0.30; by 0.26 where what comes from later steps is lost.
    assert ends["HyperLSTM"] < ends["LSTM"] - 0.27
    said = capsys.readouterr().out
    assert f"The {min(ends, key=ends.get)} is better, by" in said
    assert f"HyperLSTM   {ends['HyperLSTM']:.3f} bits" in said
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_is_cut_once(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("abcdé" * 1000, encoding="utf-8")
    found = load(file)
    assert (len(found.seen), len(found.held), found.kinds) == (4500, 500, 5)
    assert found.seen[:6].tolist() == [0, 1, 2, 3, 4, 0]


def test_bits_are_those_of_the_text_read_through():
    """In lanes, each from its own start, the state carried from window to window."""
    held = torch.randint(7, (LANES * 130 + 3,))
    model = writers(7, 8)["HyperLSTM"]()
    lanes = held[: LANES * 130].view(LANES, 130).T
    with torch.no_grad():
        scores, _ = model(lanes[:-1])
    truth = F.cross_entropy(scores.flatten(0, 1), lanes[1:].flatten()) / math.log(2)
    assert bits(model, held) == pytest.approx(truth.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--text", "nowhere.txt"], "--text must be a file, got nowhere.txt"),
        (["--out", "text.jpg"], "--out must end in .png"),
    ],
)
def test_what_cannot_work_ends_before_anything_is_learned(argv, message, capsys):
    with pytest.raises(SystemExit):
        text.main(argv)
    assert message in capsys.readouterr().err


def test_too_short_a_text(tmp_path):
    file = tmp_path / "short.txt"
    file.write_text("too short", encoding="utf-8")
    with pytest.raises(SystemExit, match="--text must have 1280 characters"):
        text.main(["--text", str(file), "--out", str(tmp_path / "a.png")])


def test_a_text_that_is_no_utf8(tmp_path):
    file = tmp_path / "latin.txt"
    file.write_bytes(b"\xe9" * 2000)
    with pytest.raises(SystemExit, match="--text must be UTF-8"):
        text.main(["--text", str(file), "--out", str(tmp_path / "a.png")])


def test_what_is_held_out_was_not_seen():
    found, n = load(), 200
    seen, held = (bytes(t.tolist()) for t in (found.seen, found.held))
    assert not [at for at in range(0, len(held) - n, 50) if held[at : at + n] in seen]
