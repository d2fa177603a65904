"""The named workloads: pure data, and the arithmetic that follows from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

MODES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Workload:
    """B tasks with N rows each; trunk z_dim -> H (relu) and head H -> P make an MLP of `sizes`."""

    modes = MODES
    requests = 1

    name: str
    B: int
    N: int
    z_dim: int
    H: int
    sizes: tuple[int, ...]
    activation: str = "relu"

    @property
    def layers(self) -> list[tuple[int, int]]:
        """(in, out) of each target layer."""
        return list(pairwise(self.sizes))

    @property
    def macs(self) -> int:
        """Multiply-adds of the target network for one row."""
        return sum(i * o for i, o in self.layers)

    @property
    def P(self) -> int:
        """Parameters of one target network."""
        return sum(i * o + o for i, o in self.layers)

    @property
    def hyper_params(self) -> int:
        """Parameters of the hypernetwork."""
        return self.H * (self.z_dim + 1) + self.P * (self.H + 1)

    def facts(self) -> dict[str, Any]:
        """What a results file says of it."""
        return asdict(self) | {"sizes": list(self.sizes), "P": self.P}

    def scaled(self, factor: int) -> Workload:
        """The same work for `factor` times as many tasks."""
        return replace(self, B=self.B * factor)

    def flops(self, mode: str) -> int:
        """The textbook count: make all weights once, then apply them; two FLOPs a multiply-add.

        Backward doubles every product, one for each operand, except in the target's first layer:
        x asks for no gradient.
        """
        generate = self.B * self.H * (self.z_dim + self.P)
        apply = self.B * self.N * self.macs
        if mode == "forward":
            return 2 * (generate + apply)
        first_in, first_out = self.layers[0]
        return 2 * (3 * (generate + apply) - self.B * self.N * first_in * first_out)

    def bytes(self, mode: str, itemsize: int = 4) -> int:
        """Compulsory traffic: every parameter, z and x read once, y written once; backward also
        reads the gradient of y and writes one gradient for each parameter and for z."""
        differentiated = self.hyper_params + self.B * self.z_dim
        rows = self.B * self.N
        forward = differentiated + rows * (self.sizes[0] + self.sizes[-1])
        if mode == "forward":
            return itemsize * forward
        return itemsize * (forward + differentiated + rows * self.sizes[-1])


@dataclass(frozen=True)
class BankWorkload:
    """Given weights of many tasks, and requests of `rows` mixed rows, each for a random task.

    One call serves all requests, lest what one leaves in the caches should serve the next call;
    times, FLOPs and bytes are of one request.
    """

    modes = MODES[:1]

    name: str
    tasks: int
    rows: int
    sizes: tuple[int, ...]
    activation: str = "relu"
    requests: int = 4

    @property
    def layers(self) -> list[tuple[int, int]]:
        """(in, out) of each layer."""
        return list(pairwise(self.sizes))

    @property
    def P(self) -> int:
        """Parameters of one network."""
        return sum(i * o + o for i, o in self.layers)

    def facts(self) -> dict[str, Any]:
        return asdict(self) | {"sizes": list(self.sizes), "P": self.P}

    def scaled(self, factor: int) -> BankWorkload:
        """As many times the tasks, and the rows."""
        return replace(self, tasks=self.tasks * factor, rows=self.rows * factor)

    def flops(self, mode: str) -> int:
        """Two a multiply-add."""
        return 2 * self.rows * sum(i * o for i, o in self.layers)

    def bytes(self, mode: str, itemsize: int = 4) -> int:
        """Compulsory traffic: x, y and ids, and once the weights of each task that is asked for. Of
        T tasks, R random rows ask for T (1 - (1 - 1/T)^R) on average."""
        touched = round(self.tasks * (1 - (1 - 1 / self.tasks) ** self.rows))
        values = touched * self.P + self.rows * (self.sizes[0] + self.sizes[-1])
        return itemsize * values + 8 * self.rows


# What has one network shape.
MLP = Workload | BankWorkload

WORKLOADS: dict[str, MLP] = {
    w.name: w
    for w in (
        Workload("mlp8_1024", B=1024, N=1, z_dim=120, H=64, sizes=(8, 32, 1)),
        Workload("mlp8_4096", B=4096, N=1, z_dim=120, H=64, sizes=(8, 32, 1)),
        Workload("digits_inr", B=256, N=64, z_dim=32, H=128, sizes=(2, 32, 1)),
        Workload("mlp64_n1", B=1024, N=1, z_dim=32, H=64, sizes=(64, 64, 10)),
        Workload("mlp64_n32", B=256, N=32, z_dim=32, H=64, sizes=(64, 64, 10)),
        Workload("mlp128_n1", B=512, N=1, z_dim=32, H=128, sizes=(128, 128, 128)),
        Workload("mlp128_n8", B=512, N=8, z_dim=32, H=128, sizes=(128, 128, 128)),
        Workload("mlp128_n64", B=512, N=64, z_dim=32, H=128, sizes=(128, 128, 128)),
        Workload("siren", B=16, N=4096, z_dim=32, H=256, sizes=(2, 64, 64, 1), activation="sin"),
        Workload("mlp64_single", B=1, N=1, z_dim=32, H=64, sizes=(64, 64, 10)),
        BankWorkload("bank20000", tasks=20_000, rows=4096, sizes=(64, 64, 10)),
    )
}
