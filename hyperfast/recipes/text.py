"""An LSTM and a HyperLSTM of as many parameters learn to write; held-out text tells the better one.

Both read Python's own manual, the topics that ``help()`` shows, or a file of yours, character by
character, and predict the next one. Both start from the same seed, see the same windows of the
text, and take the same steps:

    python -m hyperfast.recipes.text --text book.txt --out text.png

The measure is that of the paper (Ha, Dai, Le 2016, section 4.3): bits per character, on the last
tenth of the text, which neither has seen. The curves of both are drawn as they learn. Steps are
equal, time is not: it is printed, too. The HyperLSTM is layer-normalised, PyTorch's LSTM is not;
and of its parameters those of an embedding ``z_h`` or ``z_x`` stay alike, as the paper starts them.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hyperfast
from hyperfast.recipes.digits_model import replace
from hyperfast.recipes.options import parse

HELD_OUT = 0.1
WINDOW = 50  # characters of a window to learn from
LANES = 64  # windows of a step; held-out text is read in as many lanes
EMBEDDING = 32


class Text(NamedTuple):
    """Characters as numbers, to learn from and held out, and how many kinds there are."""

    seen: Tensor
    held: Tensor
    kinds: int


def load(path: Path | None = None) -> Text:
    """The manual's topics, sorted by name, or a file's text; the last tenth of it is held out."""
    if path is None:
        from pydoc_data.topics import topics

        every = sorted(topics, key=lambda name: len(topics[name]))
        # Not what stands in a longer topic, too: it could be seen and held out.
        parts = {
            name
            for n, name in enumerate(every)
            if any(body(topics[name]) in topics[longer] for longer in every[n + 1 :])
        }
        text = "\n".join(topics[name] for name in sorted(topics.keys() - parts))
    else:
        text = path.read_text(encoding="utf-8")
    number = {c: n for n, c in enumerate(sorted(set(text)))}
    codes = torch.tensor([number[c] for c in text])
    cut = round(len(codes) * (1 - HELD_OUT))
    return Text(codes[:cut], codes[cut:], len(number))


def body(topic: str) -> str:
    """A topic without its heading: that of the part of a longer one is underlined otherwise."""
    return topic.split("\n\n", 1)[-1]


class Writer(nn.Module):
    """Embedding, recurrent layer, logits of the next character."""

    def __init__(self, kinds: int, hidden: int, rnn: Callable[[int, int], nn.Module]):
        super().__init__()
        self.embedding = nn.Embedding(kinds, EMBEDDING)
        self.rnn = rnn(EMBEDDING, hidden)
        self.logits = nn.Linear(hidden, kinds)

    def forward(self, codes: Tensor, state: Sequence[Tensor] | None = None) -> tuple[Tensor, Any]:
        """``codes (T, N)``: logits ``(T, N, kinds)``, and the state after the last."""
        outputs, state = self.rnn(self.embedding(codes), state)
        return self.logits(outputs), state

    def size(self) -> int:
        return sum(p.numel() for p in self.parameters())


def hyper(ins: int, hidden: int) -> nn.Module:
    return hyperfast.nets.HyperLSTM(ins, hidden, hyper_size=hidden // 4, n_z=8)


def writers(kinds: int, hidden: int = 96) -> dict[str, Callable[[], Writer]]:
    """Makers of both; the LSTM is of the width whose parameters are nearest in number."""
    with torch.device("meta"):
        size = Writer(kinds, hidden, hyper).size()
        width = min(
            range(1, 4 * hidden), key=lambda n: abs(Writer(kinds, n, nn.LSTM).size() - size)
        )
    return {
        "LSTM": lambda: Writer(kinds, width, nn.LSTM),
        "HyperLSTM": lambda: Writer(kinds, hidden, hyper),
    }


@torch.no_grad()
def bits(model: Writer, held: Tensor) -> float:
    """Bits per character of ``held``, read in lanes from their starts to their ends."""
    lanes = held[: len(held) // LANES * LANES].view(LANES, -1).T
    total, state = 0.0, None
    for at in range(0, len(lanes) - 1, WINDOW):
        codes = lanes[at : at + WINDOW + 1]
        scores, state = model(codes[:-1], state)
        total += F.cross_entropy(scores.flatten(0, 1), codes[1:].flatten(), reduction="sum").item()
    return total / lanes[1:].numel() / math.log(2)


def train(
    name: str, make: Callable[[], Writer], text: Text, *, steps: int, every: int, seed: int = 0
) -> tuple[Writer, list[tuple[int, float]]]:
    """A writer, and after how many steps it had how many bits per character on held-out text, which
    is read every so many steps."""
    from tqdm import tqdm

    torch.manual_seed(seed)
    model = make()
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    windows = torch.Generator().manual_seed(seed)
    curve = []
    with tqdm(total=steps, desc=name, unit="step") as bar:
        for step in range(1, steps + 1):
            starts = torch.randint(len(text.seen) - WINDOW, (LANES,), generator=windows)
            codes = text.seen[starts + torch.arange(WINDOW + 1).unsqueeze(1)]
            scores, _ = model(codes[:-1])
            loss = F.cross_entropy(scores.flatten(0, 1), codes[1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # as in the paper
            optimizer.step()
            schedule.step()
            bar.update()
            if step % every == 0:
                curve.append((step, bits(model, text.held)))
                bar.set_postfix(bits=f"{curve[-1][1]:.3f}")
    return model, curve


def draw(curves: dict[str, list[tuple[int, float]]], out: Path) -> None:
    """The curves of all as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    ax = figure.add_subplot(xlabel="steps", ylabel="bits per character, held out")
    for name, curve in curves.items():
        ax.plot(*zip(*curve, strict=True), marker="o", label=f"{name}, {curve[-1][1]:.3f}")
    ax.legend()
    ax.grid(alpha=0.3)
    replace(out, lambda tmp: figure.savefig(tmp, format="png"))


def main(argv: Sequence[str] | None = None) -> int:
    """Learns twice, compares, draws; returns the exit status."""
    start = time.perf_counter()
    needs = {"matplotlib": "matplotlib", "tqdm": "tqdm"}
    files = {"text": "UTF-8, instead of the manual"}
    args = parse(argv, "text", __doc__, needs, picture=True, files=files)
    shortest = 2 * LANES
    try:
        text = load(args.text)
    except UnicodeDecodeError as error:
        sys.exit(f"--text must be UTF-8, got {args.text}: {error}")
    if len(text.held) < shortest:
        sys.exit(f"--text must have {10 * shortest} characters, so that a tenth can be held out")
    steps, every = (80, 40) if args.quick else (600, 50)
    print(f"{len(text.seen):,} characters to learn from, {len(text.held):,} held out")
    curves, ends = {}, {}
    for name, make in writers(text.kinds).items():
        began = time.perf_counter()
        model, curves[name] = train(name, make, text, steps=steps, every=every)
        ends[name] = curves[name][-1][1]
        seconds = time.perf_counter() - began
        size = f"{model.size():,} parameters, {seconds:.0f} s"
        print(f"{name:<12}{ends[name]:.3f} bits per character on held-out text ({size})")
    worse, better = sorted(ends, key=ends.__getitem__, reverse=True)
    print(f"The {better} is better, by {ends[worse] - ends[better]:.3f} bits in as many steps")
    print("(The HyperLSTM is layer-normalised, the LSTM is not.)")
    draw(curves, args.out)
    print(f"Wrote {args.out}; {time.perf_counter() - start:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
