"""Learning rate schedule, and parameters with weight decay."""

import math

import pytest
import torch
from support.models import make_aim

from amp.train.schedule import adamw, learning_rate
from amp.train.stages import set_trainable


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.1),  # the first step already learns
        (4, 0.5),
        (9, 1.0),  # the end of ten steps of warm-up
        (10, 1.0),
        (55, 0.5),  # half way down the cosine
        (32, 0.5 * (1 + math.cos(math.pi * 22 / 90))),
        (99, 0.5 * (1 + math.cos(math.pi * 89 / 90))),
        (100, 0.0),
    ],
)
def test_warm_up_then_cosine(step, expected):
    assert learning_rate(step, 100, 10, 1.0) == pytest.approx(expected, abs=1e-12)
    assert learning_rate(step, 100, 10, 3e-4) == pytest.approx(3e-4 * expected, abs=1e-12)


def test_rate_rises_then_falls():
    rates = [learning_rate(step, 200, 20, 1.0) for step in range(201)]
    assert rates[:20] == sorted(rates[:20]) and rates[20:] == sorted(rates[20:], reverse=True)
    assert min(rates[:-1]) > 0 and max(rates) == 1.0


def test_short_runs_warm_up_for_a_tenth_at_most():
    assert learning_rate(2, 30, 50, 1.0) == 1.0
    assert learning_rate(0, 30, 50, 1.0) == pytest.approx(1 / 3)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 50), (2, 50), (5, 0)])
def test_the_shortest_runs_start_at_the_peak(steps, warmup):
    assert learning_rate(0, steps, warmup, 0.5) == 0.5


def test_matrices_decay_and_nothing_else_does():
    model = make_aim()
    set_trainable(model, 1)
    decay, *rest = adamw(model, lr=5e-4, weight_decay=0.01).param_groups
    assert [group["weight_decay"] for group in (decay, *rest)] == [0.01, 0.0, 0.0]
    assert {group["lr"] for group in (decay, *rest)} == {5e-4}
    names = {id(p): name for name, p in model.named_parameters()}
    decays = {names[id(p)] for p in decay["params"]}
    stays = {names[id(p)] for group in rest for p in group["params"]}
    assert "interaction.aim.mlp.0.weight" in decays and "interaction.adapter.down.weight" in decays
    assert all(model.get_parameter(name).ndim == 2 for name in decays)
    assert {
        "logit_scale",
        "visual_prompts.prompts",
        "triplet_encoder.null",
        "interaction.null_state",
        "interaction.aim.gate",
        "interaction.aim.norm.weight",
        "interaction.adapter.norm.bias",
        "interaction.aim.mlp.0.bias",
    } <= stays
    assert decays | stays == {name for name in names.values() if not name.startswith("backbone.")}
    assert not decays & stays


def test_one_prompt_a_block_is_no_matrix():
    model = make_aim(block=2, num_prompts=1, knowledge="none")
    set_trainable(model, 1)
    (group,) = adamw(model, lr=1.0, weight_decay=0.01).param_groups
    assert group["weight_decay"] == 0 and len(group["params"]) == 2


def test_only_what_a_stage_trains_is_optimised():
    model = make_aim()
    expected = {id(p) for p in set_trainable(model, 2)}
    optimizer = adamw(model, lr=1.0, weight_decay=0.0)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == expected


def test_prompts_and_temperature_have_a_rate_of_their_own():
    model = make_aim()
    set_trainable(model, 1)
    names = {id(p): name for name, p in model.named_parameters()}
    peaks = {}
    for group in adamw(model, lr=1e-3, weight_decay=0.0, prompt_lr_factor=10.0).param_groups:
        peaks |= {names[id(p)]: group["peak"] for p in group["params"]}
    fast = {name for name, peak in peaks.items() if peak == pytest.approx(1e-2)}
    assert fast == {"visual_prompts.prompts", "logit_scale"}
    assert {peak for name, peak in peaks.items() if name not in fast} == {1e-3}
