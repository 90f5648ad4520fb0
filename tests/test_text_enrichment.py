"""Captions enriched by their knowledge: the formula, step 0, and use in training and search."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.models import make_aim, make_model

from amp.knowledge.tensors import Captions
from amp.model.layers.text_enrichment import TextEnrichment
from amp.train.stages import trainable_names


@pytest.fixture
def enriched():
    model = make_aim(trained=True, block=1, enrich=True)
    torch.manual_seed(3)
    torch.nn.init.normal_(model.text_enrichment.states.weight, std=0.3)
    return model


def test_the_formula_by_hand():
    """Two captions; the second has no knowledge."""
    layer = TextEnrichment(2, triplet_width=1)
    layer.states.weight.data = torch.tensor([[1.0, 2.0], [0.0, -1.0], [math.log(3), 0.0]])
    layer.triplets.weight.data = torch.tensor([[0.0], [4.0], [0.0]])
    layer.adapt.weight.data = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    text = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    states = torch.tensor([[[5.0, 0.0], [0.0, 0.1], [7.0, 7.0]], [[1.0, 1.0]] * 3])
    triplets = torch.tensor([[[0.0], [0.5], [9.0]], [[1.0]] * 3])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    # W of (1, 0) is (1, 0) with weight 3 / 4, W of (0, 1) is (2, -1) and V of 0.5 is (0, 2), together (2, 1) with
    # weight 1 / 4: (1.25, 0.25). U of (0.6, 0.8) is (0.8, 1.2), of (0, 1) it is (1, 0).
    want = torch.tensor([[0.6 + 0.8 + 1.25, 0.8 + 1.2 + 0.25], [1.0, 1.0]])
    torch.testing.assert_close(layer(text, states, triplets, mask), want)


@pytest.mark.parametrize("triplet_width", [None, 3])
def test_it_takes_the_mean_over_states_without_triplets_and_starts_with_it(triplet_width):
    torch.manual_seed(0)
    layer = TextEnrichment(4, triplet_width=triplet_width)
    layer.states.weight.data[:4] = 2 * torch.eye(4)
    states = F.normalize(torch.randn(1, 3, 4), dim=-1)
    change = layer(torch.ones(1, 4), states, torch.ones(1, 3, 3), torch.tensor([[True, False, True]])) - 0.5
    torch.testing.assert_close(change, states[:, 0] + states[:, 2])


def test_at_step_0_captions_keep_their_feature(knowledge, tokenizer):
    model = make_model()
    tokens = tokenizer(["a dog jumps", "a small girl", "nothing", "men chase horses"])
    with torch.no_grad():
        plain, rich = model.encode_text(tokens, normalize=True), model.encode_text(tokens, True, knowledge)
    torch.testing.assert_close(rich, plain)


def test_stage_1_trains_it_and_stage_2_does_not(enriched):
    assert "text_enrichment.states.weight" in trainable_names(enriched, 1) - trainable_names(enriched, 2)
    control = make_model(knowledge="none").text_enrichment
    assert control.adapt is not None
    assert control.states is None and control.triplets is None, "the control adapts captions and reads no knowledge"


def test_captions_are_independent_of_each_other_and_of_padding(enriched, knowledge, tokenizer):
    tokens = tokenizer(["a dog jumps", "a small girl", "nothing", "men chase horses"])
    with torch.no_grad():
        together = enriched.encode_text(tokens, True, knowledge)
        alone = torch.cat([enriched.encode_text(tokens[i : i + 1], True, knowledge[i : i + 1]) for i in range(4)])
        plain = enriched.encode_text(tokens, True)
    torch.testing.assert_close(together, alone)
    blank = Captions(enriched.prepare_knowledge(knowledge).blank(), plain)
    adapted = F.normalize(enriched(None, blank).captions.text, dim=-1)
    changed = (together - adapted).abs().amax(dim=1) > 1e-3
    assert changed.tolist() == [bool(item.triplets) for item in knowledge]
