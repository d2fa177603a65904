"""A small network for every user, and a new user served from 30 rows, without any training anew.

Users sort images into three folders, each by a rule of their own. Their networks come from one
hypernetwork, which learns from 400 users what they have in common, and from one latent each. For a
user who comes later only the latent is fitted; the network it makes is added to a TaskBank that a
TaskServer keeps serving meanwhile:

    python -m hyperfast.recipes.personal

What is real and what is not: the images are the 1,797 handwritten digits of scikit-learn; the users
are synthetic. Each puts the ten digits into folders at random, otherwise than any other user, and
nothing but sorted images is learned from: the digits' labels are seen by no model. Accuracies are
on 500 images that nothing was learned from.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence

import torch
from torch import Tensor

import hyperfast
from hyperfast.recipes.options import parse
from hyperfast.recipes.personal_model import FEW, Data, Sorters, Users, accuracy, adapt, load, train
from hyperfast.recipes.personal_rivals import HEAD, SPEC, best_fit, ceiling, fresh, run
from hyperfast.recipes.personal_rivals import train as train_rival
from hyperfast.server.stats import ServerStats


def serve_new(sorters: Sorters, data: Data, clients: int = 4) -> tuple[Tensor, ServerStats]:
    """Scores of the new users' held-out rows, by a server that answers the known users while the
    new ones are adapted and added to its bank."""
    known = sorters.latents.weight
    bank = hyperfast.TaskBank.from_latents(
        sorters.model.hyper, known, keys=[f"user {n}" for n in range(len(known))]
    )
    done = threading.Event()
    with hyperfast.TaskServer(bank) as server:

        def client(first: int) -> None:
            user = first
            while not done.is_set():
                server.submit(f"user {user}", data.known_held.images[user, 0]).result()
                user = (user + clients) % len(known)

        threads = [threading.Thread(target=client, args=(n,)) for n in range(clients)]
        for thread in threads:
            thread.start()
        try:
            latents = adapt(sorters, data.new)
            names = [f"new user {n}" for n in range(len(latents))]
            bank.add(latents, keys=names)
            futures = map(server.submit, names, data.new_held.images)
            scores = torch.stack([future.result() for future in list(futures)])
        finally:
            done.set()
            for thread in threads:
                thread.join()
        return scores, server.stats()


def agreement(sorters: Sorters, latents: Tensor, users: Users) -> float:
    """The share of rows that an int8 bank puts into the same folder as one in float32."""
    ids = torch.arange(len(latents)).repeat_interleave(users.images.shape[1])
    rows = users.images.flatten(0, 1)
    full, small = (
        hyperfast.TaskBank.from_latents(sorters.model.hyper, latents, dtype=dtype)(rows, ids)
        for dtype in (torch.float32, torch.int8)
    )
    return float((full.argmax(-1) == small.argmax(-1)).float().mean())


def compare(data: Data, steps: int, fit_steps: int) -> dict[str, float]:
    """Accuracy on the new users' held-out rows, of what they get without a latent."""
    new, held = data.new, data.new_held
    shared = train_rival(data.known, own_heads=False, steps=steps)[:1].repeat(len(new.images), 1)
    heads = train_rival(data.known, own_heads=True, steps=steps)
    mean = heads.mean(0).repeat(len(new.images), 1)
    start = fresh(len(new.images))
    fits = {
        f"a network of their own, fitted to {FEW} rows": (start, SPEC.numel),
        f"the shared one, fitted on to {FEW} rows": (shared, SPEC.numel),
        f"shared layers, a last one fitted to {FEW} rows": (mean, HEAD),
    }
    with torch.no_grad():
        found = {"one shared network": accuracy(run(held.images, shared), held)}
    for name, (weights, free) in fits.items():
        found[name] = best_fit(weights, new, held, free=free, steps=fit_steps)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Learns, adapts, serves, compares; returns the exit status."""
    start = time.perf_counter()
    args = parse(argv, "personal", __doc__, {"scikit-learn": "sklearn"})
    known = 400
    new, steps, fit_steps = (20, 400, 100) if args.quick else (50, 2000, 200)
    data = load(known, new)
    print(
        f"Real: 1,797 handwritten digits. Synthetic: {known} users to learn from and {new} new "
        "ones,\neach of whom sorts the ten digits into three folders in a way of their own."
    )
    sorters = train(data.known, steps=steps)
    print(f"{time.perf_counter() - start:.0f} s to learn the hypernetwork and {known} latents")

    scores, stats = serve_new(sorters, data)
    ours = accuracy(scores, data.new_held)
    held = data.known_held
    same = agreement(sorters, sorters.latents.weight, held)
    before = accuracy(sorters(held.images, sorters.latents.weight), held)
    print("\nRows of new users in the right folder, on images that nothing was learned from")
    print(f"  {'a latent fitted to 30 rows, served':<48}{ours:8.1%}")
    for name, score in compare(data, steps, fit_steps).items():
        print(f"  {name:<48}{score:8.1%}")
    print(f"  {'the most that any single network can reach':<48}{ceiling(data.new_held):8.1%}")
    print(f"  {'for comparison, known users by their networks':<48}{before:8.1%}")
    print(
        "Decay and time to stop of what is fitted without a latent were chosen on the held-out\n"
        "rows themselves, in its favour."
    )
    print(f"\nThe server, while new users were adapted and added to its bank\n{stats}")
    print(f"\nint8 bank and float32 agree on {same:.2%} of {held.folders.numel():,} rows")
    print(f"{time.perf_counter() - start:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
