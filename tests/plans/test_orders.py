"""Which two of the three factors are multiplied first."""

import pytest
import torch

import hyperfast
from hyperfast.plans import orders
from hyperfast.plans.sizes import Sizes

QM9 = Sizes(19_584, 19_584, 73, 73, 128, bias=False)


def test_sums_of_edges_meet_the_head_once_a_node():
    cost = orders.destinations(QM9, 1_152, 4)
    assert cost.flops == 2 * (1_152 * 73 * 73 * 128 + 19_584 * 73 * 128)
    assert orders.by_rows(QM9) / (cost.flops / 2) > 13


def test_no_sum_where_it_is_more_work():
    relations = Sizes(3, 100_000, 16, 16, 64, ragged=True)  # few tasks, many rows each
    assert orders.destinations(relations, 20_000, 4) is None
    assert orders.destinations(QM9._replace(transform=True), 1_152, 4) is None


def test_rows_that_all_share_are_projected_where_it_is_less():
    population = Sizes(10_000, 10_000, 64, 64, 16, bias=False)
    cost = orders.project(population, 4)
    assert cost.flops == 2 * (64 * 64 * 16 + 10_000 * 64 * 16)
    assert cost.extra_bytes == 64 * 16 * 4
    narrow = Sizes(100, 100 * 4096, 2, 64, 256)  # a grid of points: K is more than in
    assert orders.project(narrow, 4) is None
    assert orders.project(population._replace(transform=True), 4) is None
    wide = Sizes(10_000, 10_000 * 30_000, 64, 64, 16, bias=False)  # projected rows of 123 MB
    assert orders.project(wide, 4) is None


def test_explain_shows_the_order():
    layer = hyperfast.HyperLinear(73, 73, 128, bias=None, layout="io")
    table = hyperfast.explain(layer, (19_584, 73), (19_584, 128), dim_size=1_152)
    assert table.layers == (("73 -> 73", orders.destinations(QM9, 1_152, 4)),)
    shared = hyperfast.explain(hyperfast.HyperLinear(64, 64, 16), (1, 5, 64), (10_000, 16))
    assert shared.layers[0][1].plan == "project"
    ranked = hyperfast.explain(hyperfast.HyperLinear(64, 64, 16, rank=4), (1, 5, 64), (10_000, 16))
    assert [name for name, _ in ranked.layers] == ["64 -> 4", "4 -> 64"]
    plain = hyperfast.explain(layer, (19_584, 73), (19_584, 128))
    assert plain.layers[0][1].plan in ("contract", "tile")
    model = hyperfast.HyperMLP(hyperfast.HyperNet(5, 4, 8, 3, rank=2))
    assert len(hyperfast.explain(model, (9, 4), (9, 5)).layers) == 4
    with pytest.raises(ValueError, match="x_shape must be"):
        hyperfast.explain(layer, (19_583, 73), (19_584, 128))


def test_the_order_that_is_shown_is_the_one_that_runs():
    """Sums meet the head without an op of rows, and shared rows without any op of layers."""
    layer = hyperfast.HyperLinear(9, 8, 7)
    x, h, index = torch.randn(300, 9), torch.randn(300, 7), torch.randint(20, (300,))

    def ops(run):
        with torch.profiler.profile() as profile:
            run()
        return {e.key for e in profile.key_averages() if e.key.startswith("hyperfast::")}

    summed = ops(lambda: layer(x, h, index=index, dim_size=20))
    assert summed == {"hyperfast::hyper_linear_grad_h", "hyperfast::task_linear_grad_weight"}
    assert ops(lambda: layer(x[None, :4], h)) == set()
    assert "hyperfast::hyper_mlp" in ops(lambda: layer(x, h))
