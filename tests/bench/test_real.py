"""Real workloads: their sizes, and that all who race on them compute the same."""

from __future__ import annotations

import math

import pytest
import torch

from bench import catalog
from bench.absent import Unavailable
from bench.measure.contest import hold
from bench.problem import Judge, relative_error
from bench.real.real import CORNER, Draw, Network, Step, adopt
from bench.real.registry import REAL
from bench.rivals import OURS
from bench.rivals.real import REAL_RIVALS
from bench.workloads import MODES

EAGER = [name for name in REAL_RIVALS if "compiled" not in name]
TINY = {name: workload.small() for name, workload in REAL.items()}


def step(workload, problem, name, mode):
    try:
        return REAL_RIVALS[name].build(problem, mode)
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rival", EAGER)
@pytest.mark.parametrize("name", REAL)
@pytest.mark.filterwarnings("ignore")  # packages' deprecations are theirs
def test_all_ways_compute_the_definition(name, rival, mode):
    problem = TINY[name].problem(0, torch.float64)
    call = step(TINY[name], problem, rival, mode)
    found, exact = call.outputs(call()), problem.answer(mode, torch.float64)
    assert len(found) == len(exact) == (1 if mode == "forward" else 1 + len(problem.leaves))
    for value, truth in zip(found, exact, strict=True):
        assert truth.abs().max() > 0
        assert relative_error(value, truth) < 1e-9


@pytest.mark.parametrize("name", REAL)
def test_the_right_answer_passes_in_float32(name):
    outcomes = hold(TINY[name], MODES[1], [REAL_RIVALS["formula"]], rounds=1)
    assert outcomes["formula"].failure is None
    assert outcomes["formula"].share <= 1


@pytest.mark.parametrize("name", REAL)
def test_an_error_in_any_leaf_is_found(name):
    problem = TINY[name].problem(0, torch.float32)
    judge, right = Judge(problem, MODES[1]), problem.answer(MODES[1], torch.float32)
    for n in range(len(right)):
        wrong = [t.bfloat16().float() if i == n else t for i, t in enumerate(right)]
        assert judge.share(tuple(wrong)) > 1


def shapes(name):
    leaves, inputs = REAL[name].draw(Draw(0))
    return {key: tuple(t.shape) for key, t in {**leaves, **inputs}.items()}


def test_sizes_are_those_of_the_published_networks():
    assert shapes("nnconv_qm9")["edge_index"] == (2, 64 * 18 * 17)
    assert shapes("nnconv_qm9")["x"] == (1152, 73)
    assert shapes("nnconv_qm9")["nn.2.weight"] == (73 * 73, 128)
    himnet = shapes("himnet_step")
    assert himnet["gate.weights"] == (16, 134, 128)
    assert himnet["update.weights"] == (16, 134, 64)
    assert himnet["state"] == (16, 207, 64)
    nmix = shapes("nmix_3s5z")
    assert nmix["agent_qs"] == (19_200, 8)
    assert nmix["hyper_w_1.0.weight"] == (64, 216)
    assert nmix["hyper_w_1.2.weight"] == (256, 64)
    assert nmix["V.2.weight"] == (1, 32)
    metarl = shapes("metarl_policy")
    assert metarl["z"] == (3200, 25)
    heads = [shape for key, shape in metarl.items() if key.endswith(".weight")]
    assert sum(rows for rows, _ in heads) == 99_462
    assert shapes("dlinear_individual")["trend.weight"] == (862, 96, 336)
    assert shapes("dlinear_individual")["x"] == (16, 336, 862)
    assert shapes("population")["flat"] == (10_000, 24 * 64 + 64 + 64 * 6 + 6)
    assert shapes("condinst")["weights"] == (100, 169)
    assert shapes("condinst")["features"] == (2, 8, 100, 167)
    assert shapes("agcrn")["pool.weights"] == (10, 130, 128)
    assert shapes("agcrn")["rows"] == (64, 307, 65)
    assert shapes("lora")["A"] == (64, 8, 512)
    assert shapes("hypertab")["chosen"] == (100, 20)
    assert shapes("hypertab")["x"] == (1000, 40)
    assert shapes("hyper_lstm")["input"] == (100, 128, 128)
    assert shapes("hyper_lstm")["w_h.g"] == (256, 256)
    assert shapes("hyper_lstm")["d_x.o.weight"] == (256, 16)


def test_a_ragged_graph_has_in_degrees_of_1_to_40():
    _, inputs = REAL["nnconv_ragged"].draw(Draw(0))
    counts = inputs["edge_index"][1].bincount(minlength=1152)
    assert (len(counts), counts.min(), counts.max()) == (1152, 1, 40)
    again = REAL["nnconv_ragged"].draw(Draw(0))[1]
    assert torch.equal(again["edge_index"], inputs["edge_index"])


@pytest.mark.parametrize("name", [name for name, w in REAL.items() if w.corner])
def test_no_value_on_a_corner(name):
    problem = TINY[name].problem(0, torch.float32).to(torch.float64)
    assert TINY[name].corners({**problem.leaves, **problem.inputs}).min() >= CORNER


def test_what_is_on_a_corner_is_drawn_again(monkeypatch):
    workload = TINY["nnconv_ragged"]
    before = workload.problem(0, torch.float64)
    monkeypatch.setattr("bench.real.real.CORNER", 0.02)
    after = workload.problem(0, torch.float64)
    near = workload.corners({**before.leaves, **before.inputs}) < 0.02
    assert near.any()
    moved = (after.inputs["edge_attr"] != before.inputs["edge_attr"]).all(1, keepdim=True)
    assert torch.equal(moved, near)
    assert workload.corners({**after.leaves, **after.inputs}).min() >= 0.02


def test_counts():
    w = REAL["nnconv_qm9"]
    edges, nodes, C, H = 64 * 18 * 17, 1152, 73, 128
    forward = 2 * edges * (5 * H + H * C * C + C * C)
    assert w.flops("forward") == forward
    # Backward doubles each product, but those that would make gradients of the edges' features.
    assert w.flops("forward+backward") == 3 * forward - 2 * edges * 5 * H
    leaves = nodes * C + H * 6 + C * C * (H + 1) + C
    assert w.bytes("forward") == 4 * (leaves + edges * (2 + 5) + nodes * C)


def test_scaling_multiplies_the_tasks():
    for name, workload in REAL.items():
        twice = catalog.sized(name, 2)
        assert getattr(twice, workload.tasks) == 2 * getattr(workload, workload.tasks)
    assert catalog.sized("mlp8_1024", 1, small=True).B == 1024
    assert catalog.sized("agcrn", 1, small=True) == TINY["agcrn"]


def test_who_races_on_what():
    assert list(catalog.field(REAL["agcrn"])) == list(REAL_RIVALS)
    others = catalog.field(catalog.WORKLOADS["mlp8_1024"])
    assert set(others) & set(REAL_RIVALS) == {OURS}
    assert set(catalog.RIVALS) == set(others) | set(REAL_RIVALS)


@pytest.mark.parametrize("rival", ["formula compiled", "package compiled"])
def test_long_loops_are_not_compiled(rival):
    problem = TINY["dlinear_individual"].problem(0, torch.float32)
    with pytest.raises(Unavailable, match="minutes to compile"):
        REAL_RIVALS[rival].build(problem, "forward")


def test_gradients_come_in_the_order_and_layout_of_the_leaves():
    problem = TINY["population"].problem(0, torch.float64)
    own = {"turned": problem.leaves["flat"].mT.clone().requires_grad_()}

    def back(gradients):
        return {"flat": gradients["turned"].mT}

    def function(inputs):
        return TINY["population"].definition({"flat": own["turned"].mT}, inputs)

    call = Step(problem, Network(function, own, back), MODES[1])
    exact = problem.answer(MODES[1], torch.float64)
    assert relative_error(call.outputs(call())[1], exact[1]) < 1e-12
    assert relative_error(call()[1], exact[1]) == math.inf


def test_adopting_another_shape_is_an_error():
    with pytest.raises(ValueError, match="weight is"):
        adopt(torch.nn.Linear(2, 3), {"weight": torch.zeros(2, 3)})
