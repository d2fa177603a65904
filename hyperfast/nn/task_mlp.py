"""MLPs that own their weights, one a task, and train together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import import_module
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from hyperfast import checks
from hyperfast.activations import Activation
from hyperfast.functional import stored_mlp
from hyperfast.layout import MLPSpec, positive, widths
from hyperfast.nn.any_module import as_mlp
from hyperfast.nn.copies import clone
from hyperfast.nn.target import TargetNet


class TaskMLP(nn.Module):
    """``tasks`` MLPs of one shape, each with weights of its own, as one module that trains them
    all: ensembles, populations, a network a user, a sensor or an agent.

    Args:
        tasks: how many networks.
        in_features: of each.
        hidden: width of its hidden layer, or a sequence of widths, one a hidden layer; an empty one
            makes it a single linear layer.
        out_features: of each.
        activation: after every layer but the last; a name, a module or a function. What parameters
            a module has, all tasks share.
        bias: whether layers have biases, or a sequence of that, one a layer.
        device, dtype: of the parameters.

    Attributes:
        weight: ``(tasks, P)``, the weights of every network, laid out as ``spec`` says;
            ``net.spec.split(net.weight)`` are views of its matrices and biases.
        spec: :class:`hyperfast.MLPSpec`.
        target: the :class:`hyperfast.TargetNet` that has the activations.

    Raises:
        TypeError: a size that is not an int.
        ValueError: a size below one, an unknown activation.

    Example:
        >>> net = hyperfast.TaskMLP(100, 10, (64, 64), 1)
        >>> net(torch.randn(1, 32, 10)).shape  # the same 32 rows through all networks
        torch.Size([100, 32, 1])
    """

    def __init__(
        self,
        tasks: int,
        in_features: int,
        hidden: int | Sequence[int],
        out_features: int,
        activation: Activation = "relu",
        *,
        bias: bool | Sequence[bool] = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        sizes = positive("in_features", in_features), *widths("hidden", hidden)
        spec = MLPSpec((*sizes, positive("out_features", out_features)), bias)
        self._build(positive("tasks", tasks), spec, TargetNet(activation), device, dtype)
        self.reset_parameters()

    def _build(
        self,
        tasks: int,
        spec: MLPSpec,
        target: TargetNet,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.spec, self.target = spec, target
        self.weight = nn.Parameter(torch.empty(tasks, spec.numel, device=device, dtype=dtype))
        self._template: tuple[nn.Module, ...] = ()  # in a tuple it is no part of this module

    @classmethod
    def from_modules(cls, modules: Iterable[nn.Module]) -> TaskMLP:
        """The networks of ``modules``, whose weights are copied.

        Args:
            modules: ``nn.Linear`` layers, or stacks of these with activations between them in
                ``nn.Sequential``; all alike.

        Raises:
            TypeError: one is not such a module, or they are not several.
            ValueError: there is none, or one differs from the first; the message names it.
        """
        if not isinstance(modules, Iterable):
            raise TypeError(f"modules must be several networks, got {type(modules).__name__}")
        nets = list(modules)
        if not nets:
            raise ValueError("modules must hold at least one network, got none")
        first = None
        rows = []
        for n, net in enumerate(nets):
            found = as_mlp(net) if isinstance(net, nn.Module) else None
            if found is None:
                raise TypeError(
                    f"modules[{n}] must be a plain stack of nn.Linear and of activations without "
                    f"parameters or hooks, got {net!r}"
                )
            spec, target = found
            parameters = list(net.parameters())
            kind = (
                spec.sizes,
                spec.bias,
                str(target.activations),
                [(p.dtype, str(p.device)) for p in parameters],
            )
            if first is None:
                first = kind
            for name, mine, wanted in zip(
                ("widths", "biases", "activations", "dtype and device"), kind, first, strict=True
            ):
                if mine != wanted:
                    raise ValueError(
                        f"modules[{n}] must have the {name} of modules[0], {wanted}, got {mine}"
                    )
            rows.append(torch.cat([p.detach().flatten() for p in parameters]))
        spec, target = as_mlp(nets[0])  # type: ignore[misc]
        many = cls.__new__(cls)
        many._build(len(nets), spec, target, rows[0].device, rows[0].dtype)
        with torch.no_grad():
            torch.stack(rows, out=many.weight)
        many._template = (clone(nets[0]),)
        return many

    @property
    def tasks(self) -> int:
        return len(self.weight)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialises every network as one of ``nn.Linear`` layers is: weights and biases uniform
        within ``1 / sqrt(in)``."""
        for layer in self.spec.layers:
            bound = layer.in_features**-0.5
            nn.init.uniform_(self.weight[:, layer.begin : layer.end], -bound, bound)

    def forward(self, x: Tensor, task_ids: Tensor | None = None) -> Tensor:
        """Runs every network on its rows.

        Args:
            x: ``(tasks, N, in)``, ``(tasks, in)``, ``(R, in)`` with ``task_ids``, or ``(1, N,
                in)``, the same rows for all.
            task_ids: ``(R,)`` int64: row ``r`` runs through network ``task_ids[r]``.

        Returns:
            ``x`` with its last dimension replaced by the output width; ``(tasks, N, out)`` of
            shared rows.

        Raises:
            ValueError: shapes or devices that disagree.
            TypeError: dtypes that disagree, ids that are not int64.
            IndexError: a task out of range.
        """
        checks.check_like_weight(self.weight, "the module", x=x)
        activations = self.target.layer_activations(len(self.spec.layers))
        return stored_mlp(x, self.weight, self.spec, activations, task_ids)

    def to_modules(self) -> list[nn.Module]:
        """The networks one by one, with copies of their weights: as those that
        :meth:`from_modules` was given, else ``nn.Sequential``."""
        nets = []
        for row in self.weight.detach():
            net, parameters = self._one()
            with torch.no_grad():
                for parameter, value in zip(parameters, self.spec.split(row), strict=True):
                    parameter.copy_(value)
            nets.append(net)
        return nets

    def _one(self) -> tuple[nn.Module, list[nn.Parameter]]:
        """A network, and what is to hold its weights; parameters of activations are not among it,
        which all tasks share."""
        kind: dict[str, Any] = {"device": self.weight.device, "dtype": self.weight.dtype}
        for template in self._template:  # its activations have no parameters
            net = clone(template).to(**kind)
            return net, list(net.parameters())
        layers: list[nn.Module] = []
        parameters: list[nn.Parameter] = []
        activations = self.target.layer_activations(len(self.spec.layers))
        for (i, o), bias, activation in zip(
            pairwise(self.spec.sizes), self.spec.biases, activations, strict=True
        ):
            layers.append(nn.Linear(i, o, bias=bias, **kind))
            parameters += layers[-1].parameters()
            if activation is not None:
                layers.append(clone(activation))
        return nn.Sequential(*layers), parameters

    def bank(self, dtype: torch.dtype | None = None) -> Any:
        """A :class:`hyperfast.TaskBank` of copies of the networks, for inference.

        Args:
            dtype: how it stores them, by default as they are; see ``TaskBank.from_weights``.
        """
        bank = import_module("hyperfast.bank").TaskBank  # a room above this one
        weights = self.weight.detach()
        return bank.from_weights(self.spec, weights, dtype=dtype, target=self.target)

    def extra_repr(self) -> str:
        return f"tasks={self.tasks}, spec={self.spec}"
