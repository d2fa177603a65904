"""How users of hypernetworks and of many networks write their layers here.

Of each: their formula in plain PyTorch, and ours, made of their checkpoint. A checkpoint becomes
ours by moving numbers about, and so must its gradient.
"""

from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hyperfast
from hyperfast import HyperLinear, HyperMLP, HyperNet, MLPSpec, Sine, TargetNet, TaskLinear
from tests.support.draw import draw

equal = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


def mlp(*widths, activation=nn.ReLU):
    layers = [nn.Linear(i, o) for i, o in pairwise(widths)]
    return nn.Sequential(*[m for layer in layers for m in (layer, activation())][:-1])


class Theirs(nn.Module):
    """Their parameters, as ``parts`` names them, and their formula."""

    def __init__(self, formula, **parts):
        super().__init__()
        self.formula = formula
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, torch.Tensor) else part)
        self.double()

    def forward(self, *args):
        return self.formula(self, *args)


class PyTorchGeometric:
    """``NNConv``: a matrix an edge, made by a network of the edge; mean over a node's edges."""

    @staticmethod
    def inputs():
        return draw(9, 4), torch.randint(9, (2, 30)), draw(30, 3)

    @staticmethod
    def theirs():
        def formula(self, x, edges, e):
            weight = self.nn(e).view(-1, 4, 6)
            messages = torch.matmul(x[edges[0]].unsqueeze(1), weight).squeeze(1)
            count = torch.bincount(edges[1], minlength=9).clamp(min=1).unsqueeze(1)
            return messages.new_zeros(9, 6).index_add(0, edges[1], messages) / count + self.lin(x)

        return Theirs(formula, nn=mlp(3, 8, 24), lin=nn.Linear(4, 6, bias=False))

    @staticmethod
    def ours(state):
        conv = hyperfast.nets.NNConv(4, 6, mlp(3, 8, 24), aggr="mean", bias=False).double()
        conv.load_state_dict(state)
        return conv, conv


class Pymarl:
    """``nmix``: QMIX's mixer, of agents' values and the state."""

    @staticmethod
    def inputs():
        return draw(2, 5, 3), draw(2, 5, 7)

    @staticmethod
    def theirs():
        def formula(self, q, s):
            w1, w2 = self.hyper_w1(s).abs().unflatten(-1, (3, 4)), self.hyper_w2(s).abs()
            hidden = F.elu(torch.matmul(q.unsqueeze(-2), w1).squeeze(-2) + self.hyper_b1(s))
            return torch.matmul(hidden.unsqueeze(-2), w2.unsqueeze(-1))[..., 0] + self.hyper_b2(s)

        b1 = nn.Sequential(nn.Linear(7, 4))
        nets = {"hyper_w1": mlp(7, 6, 12), "hyper_w2": mlp(7, 6, 4), "hyper_b2": mlp(7, 4, 1)}
        return Theirs(formula, hyper_b1=b1, **nets)

    @staticmethod
    def ours(state):
        mixer = hyperfast.nets.QMixer(3, 7, 4, hypernet_embed=6).double()
        mixer.load_state_dict(state)
        return mixer, mixer


class MLAgents:
    """Goal conditioning: a trunk with a norm, one row a goal, a bias that all goals share."""

    @staticmethod
    def inputs():
        return draw(20, 5), draw(20, 3)

    @staticmethod
    def trunk():
        return nn.Sequential(*mlp(3, 8, 8, 8, activation=nn.SiLU)[:4], nn.LayerNorm(8))

    @classmethod
    def theirs(cls):
        def formula(self, x, goal):
            weight = self.flat(self.trunk(goal)).view(-1, 5, 6)
            return torch.bmm(x.unsqueeze(1), weight).squeeze(1) + self.bias

        return Theirs(formula, trunk=cls.trunk(), flat=nn.Linear(8, 30), bias=torch.randn(6))

    @classmethod
    def ours(cls, state):
        layer = HyperLinear(5, 6, 8, bias="shared", layout="io")
        net = nn.ModuleDict({"trunk": cls.trunk(), "layer": layer}).double()
        names = {"flat.weight": "layer.head.weight", "flat.bias": "layer.head.bias"}
        names["bias"] = "layer.bias"
        net.load_state_dict({names.get(k, k): v for k, v in state.items()})
        return net, lambda x, goal: layer(x, net["trunk"](goal))


class AGCRN:
    """A layer a node, of the node's embedding and a pool; every node's rows are the batch's."""

    @staticmethod
    def inputs():
        return draw(8, 5, 2, 3), draw(5, 4)  # batch, nodes, supports, channels; embeddings

    @staticmethod
    def theirs():
        def formula(self, x, e):
            weight = torch.einsum("nd,dkio->nkio", e, self.weights_pool)
            return torch.einsum("bnki,nkio->bno", x, weight) + e @ self.bias_pool

        return Theirs(formula, weights_pool=torch.randn(4, 2, 3, 6), bias_pool=torch.randn(4, 6))

    @staticmethod
    def ours(state):
        layer = HyperLinear(2 * 3, 6, 4, head_bias=False, layout="io").double()
        pools = [state["weights_pool"].flatten(1).mT, state["bias_pool"].mT]
        layer.load_state_dict({"head.weight": torch.cat(pools)})
        return layer, lambda x, e: layer(x.flatten(2).transpose(0, 1), e).transpose(0, 1)


class HimNet:
    """The same with a layer for every node of every sample: features ``(B, N, K)``."""

    @staticmethod
    def inputs():
        return draw(8, 5, 6), draw(8, 5, 4)

    @staticmethod
    def theirs():
        def formula(self, x, e):
            weight = torch.einsum("bnd,dio->bnio", e, self.weights_pool)
            return torch.einsum("bni,bnio->bno", x, weight) + e @ self.bias_pool

        return Theirs(formula, weights_pool=torch.randn(4, 6, 7), bias_pool=torch.randn(4, 7))

    @staticmethod
    def ours(state):
        layer = HyperLinear(6, 7, 4, head_bias=False, layout="io").double()
        pools = [state["weights_pool"].flatten(1).mT, state["bias_pool"].mT]
        layer.load_state_dict({"head.weight": torch.cat(pools)})
        return layer, layer


class MetaRL:
    """A recurrent state becomes a whole policy: a linear head for every weight and bias, one row a
    task."""

    SHAPES = ((8, 5), (8,), (6, 8), (6,), (2, 6), (2,))

    @staticmethod
    def inputs():
        return draw(20, 5), draw(20, 3)

    @classmethod
    def theirs(cls):
        def formula(self, x, z):
            tensors = [h(z).view(-1, *s) for h, s in zip(self.heads, cls.SHAPES, strict=True)]
            for n in (0, 2, 4):
                x = (x.unsqueeze(1) * tensors[n]).sum(2) + tensors[n + 1]
                x = x.tanh() if n < 4 else x
            return x

        heads = [nn.Linear(3, torch.Size(shape).numel()) for shape in cls.SHAPES]
        return Theirs(formula, heads=nn.ModuleList(heads))

    @staticmethod
    def ours(state):
        hyper = HyperNet(3, 5, (8, 6), 2, hidden=(), target_activation="tanh").double()
        for name, parameter in hyper.head.named_parameters():
            parameter.data = torch.cat([state[f"heads.{n}.{name}"] for n in range(6)])
        model = HyperMLP(hyper)
        return model, model


class HyperTab:
    """A network for every choice of columns, each on its own columns; the last layer of the trunk
    is linear. Their loop over networks is one call."""

    @staticmethod
    def inputs():
        masks = torch.stack([F.one_hot(torch.randperm(9)[:4], 9).sum(0) for _ in range(6)])
        return draw(20, 9), masks.double()

    @staticmethod
    def theirs():
        def formula(self, x, masks):
            votes = []
            for mask, flat in zip(masks, self.net(masks), strict=True):
                w1, b1, w2, b2 = flat.split([4 * 10, 10, 10 * 3, 3])
                hidden = F.linear(x[:, mask > 0], w1.view(10, 4), b1).relu()
                votes.append(F.linear(hidden, w2.view(3, 10), b2))
            return torch.stack(votes).mean(0)

        return Theirs(formula, net=nn.Sequential(*mlp(9, 12, 8, 7), nn.Linear(7, 83)))

    @staticmethod
    def ours(state):
        model = HyperMLP(HyperNet(9, 4, 10, 3, trunk=mlp(9, 12, 8, 7))).double()
        for name, value in state.items():
            _, layer, kind = name.split(".")
            trunk_and_head = [*model.hyper.generator[0], model.hyper.head]
            setattr(trunk_and_head[int(layer)], kind, nn.Parameter(value))
        columns = lambda masks: masks.nonzero()[:, 1].view(len(masks), -1)  # noqa: E731
        return model, lambda x, masks: model(x.mT[columns(masks)].mT, masks).mean(0)


class DLinear:
    """``individual=True``: two linear layers a channel, for seasons and trend."""

    @staticmethod
    def inputs():
        return draw(4, 12, 5), draw(4, 12, 5)  # batch, time, channels

    @staticmethod
    def theirs():
        def formula(self, seasonal, trend):
            parts = (self.Linear_Seasonal, seasonal), (self.Linear_Trend, trend)
            each = [[net(x[:, :, n]) for n, net in enumerate(nets)] for nets, x in parts]
            return torch.stack([s + t for s, t in zip(*each, strict=True)], 2)

        new = lambda: nn.ModuleList(nn.Linear(12, 7) for _ in range(5))  # noqa: E731
        return Theirs(formula, Linear_Seasonal=new(), Linear_Trend=new())

    @staticmethod
    def ours(state):
        names = "Linear_Seasonal", "Linear_Trend"
        nets = nn.ModuleDict({name: TaskLinear(5, 12, 7) for name in names}).double()
        for name, parameter in nets.named_parameters():
            part, kind = name.split(".")
            parameter.data = torch.stack([state[f"{part}.{n}.{kind}"] for n in range(5)])
        run = lambda net, x: net(x.permute(2, 0, 1)).permute(1, 2, 0)  # noqa: E731
        return nets, lambda *parts: sum(map(run, nets.values(), parts))


class EvoTorch:
    """A population of flat vectors, one observation each; there, ``vmap`` of a functional call."""

    @staticmethod
    def inputs():
        return draw(30, 5), draw(30, 5 * 8 + 8 + 8 * 2 + 2)

    @staticmethod
    def theirs():
        net = mlp(5, 8, 2, activation=nn.Tanh).double()

        def one(x, flat):
            parts = flat.split([p.numel() for p in net.parameters()])
            named = zip(net.named_parameters(), parts, strict=True)
            return torch.func.functional_call(net, {n: f.view(p.shape) for (n, p), f in named}, x)

        return Theirs(lambda self, x, flat: torch.vmap(one)(x, flat))

    @staticmethod
    def ours(state):
        target, spec = TargetNet("tanh"), MLPSpec((5, 8, 2))
        return target, lambda x, flat: target(x, spec.split(flat))


class LoRA:
    """Adapters of many tasks in one batch: every row has its own, beside a layer that all share."""

    @staticmethod
    def inputs():
        return draw(20, 6), torch.randint(4, (20,))

    @staticmethod
    def theirs():
        def formula(self, x, ids):
            down = torch.bmm(self.A[ids], x.unsqueeze(2))
            return self.base(x) + torch.bmm(self.B[ids], down).squeeze(2)

        return Theirs(formula, A=torch.randn(4, 2, 6), B=torch.randn(4, 7, 2), base=nn.Linear(6, 7))

    @staticmethod
    def ours(state):
        layer = TaskLinear(4, 6, 7, bias=False, rank=2, base=nn.Linear(6, 7)).double()
        names = {"A": "weight_a", "B": "weight_b"}
        layer.load_state_dict({names.get(name, name): value for name, value in state.items()})
        return layer, layer


class CondInst:
    """169 numbers an instance are the three layers of its mask head: all weights, then all biases;
    there, grouped convolutions."""

    SIZES = (10 * 8, 8 * 8, 8 * 1, 8, 8, 1)

    @staticmethod
    def inputs():
        return draw(6, 10, 4, 5), draw(6, 169)

    @classmethod
    def theirs(cls):
        def formula(self, maps, flat):
            n, (*weights, b1, b2, b3) = len(flat), flat.split(cls.SIZES, 1)
            x = maps.reshape(1, -1, *maps.shape[2:])
            for w, b, out in zip(weights, (b1, b2, b3), (8, 8, 1), strict=True):
                w = w.reshape(n * out, -1, 1, 1)
                x = F.conv2d(x, w, b.reshape(-1), groups=n)
                x = x.relu() if out == 8 else x
            return x.view(n, *maps.shape[2:])

        return Theirs(formula)

    @classmethod
    def ours(cls, state):
        target = TargetNet("relu")

        def run(maps, flat):
            w1, w2, w3, *b = flat.split(cls.SIZES, 1)
            w1, w2, w3 = w1.view(-1, 8, 10), w2.view(-1, 8, 8), w3.view(-1, 1, 8)
            y = target(maps.flatten(2).mT, (w1, b[0], w2, b[1], w3, b[2]))
            return y.view(len(flat), *maps.shape[2:])

        return target, run


class SIREN:
    """A hypernetwork of its own for every tensor of the target, whose activation is sin(30 x)."""

    @staticmethod
    def inputs():
        return draw(3, 7, 2), draw(3, 4, scale=0.1)

    @staticmethod
    def theirs():
        def formula(self, x, z):
            w1, b1, w2, b2 = (net(z) for net in self.nets)
            x = torch.sin(30 * (x @ w1.view(-1, 6, 2).mT + b1.unsqueeze(1)))
            return x @ w2.view(-1, 3, 6).mT + b2.unsqueeze(1)

        return Theirs(formula, nets=nn.ModuleList(mlp(4, 8, 8, n) for n in (12, 6, 18, 3)))

    @staticmethod
    def ours(state):
        hyper = HyperNet(4, 2, 6, 3, hidden=(8, 8), separate=True, target_activation=Sine(30.0))
        model = HyperMLP(hyper).double()
        names = {name: name.replace("nets", "hyper.generator") for name in state}
        model.load_state_dict({names[name]: value for name, value in state.items()})
        return model, model


USERS = [PyTorchGeometric, Pymarl, MLAgents, AGCRN, HimNet, MetaRL]
USERS += [HyperTab, DLinear, EvoTorch, LoRA, CondInst, SIREN]


@pytest.mark.parametrize("user", USERS, ids=lambda user: user.__name__)
def test_ours_equals_theirs(user):
    theirs, given = user.theirs(), user.inputs()
    net, run = user.ours(theirs.state_dict())
    if isinstance(net, HyperMLP):
        assert net.fused
    inputs = [t.requires_grad_() for t in given if t.is_floating_point()]
    y, expected = run(*given), theirs(*given)
    equal(y, expected)
    weight = draw(*y.shape)
    found = torch.autograd.grad(y, [*inputs, *net.parameters()], weight)
    names, parameters = zip(*theirs.named_parameters(), strict=True) if theirs.state_dict() else ((), ())  # fmt: skip # noqa: E501
    wanted = torch.autograd.grad(expected, [*inputs, *parameters], weight)
    gradients = dict(zip(names, wanted[len(inputs) :], strict=True))
    of_theirs, _ = user.ours(gradients)
    wanted = [*wanted[: len(inputs)], *(p.detach() for p in of_theirs.parameters())]
    for a, b in zip(found, wanted, strict=True):
        equal(a, b)
