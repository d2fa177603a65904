"""QMIX finds the 8 of the two-step game; VDN, with the same agents, settles for 7.

The game is that of Rashid et al. 2018, "QMIX: Monotonic Value Function Factorisation for Deep
Multi-Agent Reinforcement Learning", and so is the experiment: two agents act at once, twice. The
first action of agent 1 alone decides where the second ones are paid: in state 2A every pair of
actions earns 7, in state 2B only both agents' action B earns 8:

    2A:  7  7      2B:  0  1
         7  7           1  8

Both learn from uniformly random play (epsilon = 1, discount 0.99). Every agent has a network of its
own, state -> values of its actions, the two of them one :class:`hyperfast.TaskMLP`. VDN (Sunehag et
al. 2017) adds up their values; QMIX mixes them with :class:`hyperfast.nets.QMixer`, whose weights
are generated from the state, and positive:

    python -m hyperfast.recipes.two_step

Sums cannot show that B pays only if both play it: the best one in 2B, by least squares, has 6.5
where the game has 8, so VDN prefers 2A. That sum is printed beside what VDN learns; beside QMIX
stand the values of the game itself, which are those of the paper's table, too.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hyperfast
from hyperfast.recipes.options import parse

STATES = ("1", "2A", "2B")
PAYOFFS = torch.tensor([[[0.0, 0], [0, 0]], [[7, 7], [7, 7]], [[0, 1], [1, 8]]])
GAMMA = 0.99
JOINT = torch.cartesian_prod(torch.arange(2), torch.arange(2))  # all pairs of actions


class Sum(nn.Module):
    """VDN's mixer: the sum of the agents' values, whatever the state."""

    def forward(self, agent_qs: Tensor, states: Tensor) -> Tensor:
        return agent_qs.sum(-1, keepdim=True)


class Team(nn.Module):
    """Two agents and what makes one value of theirs."""

    def __init__(self, mixer: nn.Module, width: int = 64):
        super().__init__()
        self.agents = hyperfast.TaskMLP(2, len(STATES), width, 2)
        self.mixer = mixer

    def utilities(self, state: Tensor) -> Tensor:
        """``(R, 2, 2)``: of every agent, of each of its actions, in states ``(R,)``."""
        return self.agents(F.one_hot(state, len(STATES)).float().unsqueeze(0)).transpose(0, 1)

    def forward(self, state: Tensor, actions: Tensor | None = None) -> Tensor:
        """Joint values ``(R,)`` of ``actions (R, 2)``; by default of the greedy ones."""
        qs = self.utilities(state)
        chosen = qs.amax(-1) if actions is None else qs.gather(2, actions.unsqueeze(2)).squeeze(2)
        return self.mixer(chosen, F.one_hot(state, len(STATES)).float()).flatten()

    def table(self) -> Tensor:
        """``(3, 2, 2)``: joint values in every state, agent 1's actions down, agent 2's across."""
        with torch.no_grad():
            values = self(torch.arange(3).repeat_interleave(4), JOINT.repeat(3, 1))
        return values.view(3, 2, 2)

    @torch.no_grad()
    def play(self) -> float:
        """What the agents earn, each by its own greedy action."""
        first = self.utilities(torch.tensor([0])).argmax(-1)[0]
        second = 1 + first[:1]
        actions = self.utilities(second).argmax(-1)[0]
        return float(PAYOFFS[second, actions[0], actions[1]])


def train(
    mixer: Callable[[], nn.Module],
    *,
    steps: int,
    episodes: int = 64,
    lr: float = 3e-3,
    sync: int = 50,
    seed: int = 0,
) -> Team:
    """Q-learning on fresh random episodes, with a target network that follows every ``sync``
    steps; the step size falls to zero at the end."""
    from tqdm import tqdm

    torch.manual_seed(seed)
    team = Team(mixer())
    target = copy.deepcopy(team)
    optimizer = torch.optim.Adam(team.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    with tqdm(total=steps, desc=type(team.mixer).__name__, unit="step") as bar:
        for step in range(steps):
            if step % sync == 0:
                target.load_state_dict(team.state_dict())
            first, second = torch.randint(2, (2, episodes, 2))
            state = 1 + first[:, 0]
            with torch.no_grad():
                later = GAMMA * target(state)
            wanted = torch.cat([later, PAYOFFS[state, second[:, 0], second[:, 1]]])
            states = torch.cat([torch.zeros_like(state), state])
            loss = F.mse_loss(team(states, torch.cat([first, second])), wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
        bar.set_postfix(loss=f"{loss.item():.4f}")
    return team


def additive(payoffs: Tensor) -> Tensor:
    """The sums of a row's and a column's value nearest to ``payoffs (..., 2, 2)``."""
    return payoffs.mean(-1, True) + payoffs.mean(-2, True) - payoffs.mean((-2, -1), True)


def values(fit: Callable[[Tensor], Tensor]) -> Tensor:
    """``(3, 2, 2)``: joint values of greedy play by a team that fits each state with ``fit``."""
    late = fit(PAYOFFS[1:])
    first = GAMMA * late.amax((1, 2)).unsqueeze(1).expand(2, 2)
    return torch.cat([fit(first).unsqueeze(0), late])


def main(argv: Sequence[str] | None = None) -> int:
    """Learns twice, prints all tables; returns the exit status."""
    start = time.perf_counter()
    args = parse(argv, "two_step", __doc__, {"tqdm": "tqdm"})
    steps = 600 if args.quick else 2000
    for name, mixer, fit, what in (
        ("VDN", Sum, additive, "best sum"),
        ("QMIX", lambda: hyperfast.nets.QMixer(2, len(STATES), 8), lambda p: p, "game, paper"),
    ):
        team = train(mixer, steps=steps)
        print(f"\n{name}: joint values, and greedy play earns {team.play():g}")
        print(f"  {'state':<8}{'learned':<24}{what}")
        for state, learned, exact in zip(STATES, team.table(), values(fit), strict=True):
            for label, a, b in zip((state, ""), learned.tolist(), exact.tolist(), strict=True):
                mine, wanted = ("".join(f"{v:8.2f}" for v in row) for row in (a, b))
                print(f"  {label:<4}{mine:<20}{wanted}")
    print(f"\n{time.perf_counter() - start:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
