"""Static hypernetworks: the paper's equations for a net of convolutions, and how it trains."""

import pytest
import torch
from torch import nn

from hyperfast.nets import StaticHyperNet
from tests.support.budget import close
from tests.support.draw import draw


def net():
    """Two kernels of one size, of which the blocks of 4 x 3 do not fit; one of another; a head."""
    convs = nn.Conv2d(2, 5, 3, padding=1), nn.Conv2d(5, 8, 3), nn.Conv2d(8, 4, 1)
    parts = [m for conv in convs for m in (conv, nn.BatchNorm2d(conv.out_channels), nn.Tanh())]
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(64, 3)).double()


def test_kernels_are_those_of_the_paper():
    """``a_i = W_i z + b_i``, ``K_i = W_out a_i + b_out``; side by side, cut at the ends."""
    static = StaticHyperNet(net(), 6, chunks=(4, 3))
    embeddings, (head, other) = static.hyper.generator.embeddings, static.hyper.generator.heads
    assert len(embeddings) == 2 * 1 + 2 * 2 + 1 * 3
    first, _, last = head
    assert (first.in_features, first.out_features, last.out_features) == (6, 3 * 6, 4 * 9)
    blocks = []
    for z in embeddings[:6]:
        a = [first.weight[6 * i : 6 * i + 6] @ z + first.bias[6 * i : 6 * i + 6] for i in range(3)]
        blocks.append(torch.stack([last(v).view(4, 3, 3) for v in a], 1))
    left = torch.cat([blocks[0], blocks[1]])[:5, :2]
    right = torch.cat([torch.cat(blocks[2:4], 1), torch.cat(blocks[4:], 1)])[:8, :5]
    made = static.weights()
    assert list(made) == ["0.weight", "3.weight", "6.weight"]
    close(made["0.weight"], static.hyper.generator.scale[0] * left)
    close(made["3.weight"], static.hyper.generator.scale[1] * right)
    assert other[2].out_features == 4  # kernels of 1 x 1 have layers of their own


def test_it_is_the_net_with_those_kernels_and_its_other_parameters():
    plain = net()
    static = StaticHyperNet(plain, 6, chunks=(4, 3))
    own = {name.removeprefix("target.net.") for name in static.state_dict() if "target" in name}
    assert own == plain.state_dict().keys() - static.weights().keys()
    with torch.no_grad():
        for name, kernel in static.weights().items():
            plain.get_parameter(name).copy_(kernel)
    x = draw(7, 2, 6, 6)
    for _ in range(2):  # in training, statistics run along, too
        close(static(x), plain(x))
    close(static.eval()(x), plain.eval()(x))


def test_it_trains_from_kernels_of_the_variance_of_ones_own():
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Conv2d(64, 128, 1))
    static = StaticHyperNet(wide)
    for kernel, fan in zip(static.weights().values(), (64 * 9, 64), strict=True):
        assert 0.8 < kernel.var() * fan < 1.25
    static = StaticHyperNet(net(), 6, chunks=(4, 3))
    static(draw(7, 2, 6, 6)).square().sum().backward()
    assert all(p.grad.any() for n, p in static.named_parameters() if n.startswith("hyper"))
    other = StaticHyperNet(net(), 6, chunks=(4, 3))
    other.load_state_dict(static.state_dict())
    assert torch.equal(
        other.eval()(draw(1, 2, 6, 6, seed=0)), static.eval()(draw(1, 2, 6, 6, seed=0))
    )


def test_any_chunks_and_parameters():
    static = StaticHyperNet(net(), 6, chunks=50, params=["3.*", "10.weight"])
    assert list(static.weights()) == ["3.weight", "3.bias", "10.weight"]
    assert static(draw(7, 2, 6, 6)).shape == (7, 3)
    mlp = StaticHyperNet(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), params=None)
    assert mlp(torch.randn(5, 3)).shape == (5, 2)


@pytest.mark.parametrize(
    ("error", "message", "args"),
    [
        (ValueError, "z_dim must be at least 1, got 0", (net(), 0)),
        (TypeError, r"net must be a torch\.nn\.Module, got str", ("net",)),
        (ValueError, "net must have kernels", (nn.Linear(2, 3),)),
    ],
    ids=str,
)
def test_bad_arguments(error, message, args):
    with pytest.raises(error, match=message):
        StaticHyperNet(*args)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_compiles_and_exports_for_any_number_of_images(dynamo):
    static = StaticHyperNet(net(), 6, chunks=(4, 3)).eval()
    x, images = draw(5, 2, 6, 6), torch.export.Dim("images", min=2)
    exported = torch.export.export(static, (x,), dynamic_shapes=({0: images},)).module()
    compiled = torch.compile(static, fullgraph=True, backend="aot_eager")
    close(exported(x[:2]), static(x[:2]))
    close(compiled(x), static(x))
