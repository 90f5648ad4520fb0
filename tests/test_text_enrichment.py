"""Captions enriched by their knowledge: the formula, step 0, and that training and search score against them."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model
from test_evaluate import World

from amp.model.layers.text_enrichment import TextEnrichment
from amp.train.stages import trainable_names


@pytest.fixture
def enriched():
    model = make_model(trained=True, text_enrichment=True, interaction_layer=1)
    torch.manual_seed(3)
    torch.nn.init.normal_(model.text_enrichment.states.weight, std=0.3)
    return model


def test_the_formula_by_hand():
    """Two captions, the second without any knowledge."""
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
    model = make_model(text_enrichment=True)
    tokens = tokenizer(["a dog jumps", "a small girl", "nothing", "men chase horses"])
    with torch.no_grad():
        plain, rich = model.encode_text(tokens, normalize=True), model.encode_text(tokens, True, knowledge)
    torch.testing.assert_close(rich, plain)


def test_stage_1_trains_it_and_stage_2_does_not(enriched):
    assert "text_enrichment.states.weight" in trainable_names(enriched, 1) - trainable_names(enriched, 2)
    control = make_model(knowledge="none", text_enrichment=True).text_enrichment
    assert control.adapt is not None
    assert control.states is None and control.triplets is None, "the control adapts captions and reads no knowledge"


def test_captions_are_independent_of_each_other_and_of_padding(enriched, knowledge, tokenizer):
    tokens = tokenizer(["a dog jumps", "a small girl", "nothing", "men chase horses"])
    with torch.no_grad():
        together = enriched.encode_text(tokens, True, knowledge)
        alone = torch.cat([enriched.encode_text(tokens[i : i + 1], True, knowledge[i : i + 1]) for i in range(4)])
        plain = enriched.encode_text(tokens, True)
    torch.testing.assert_close(together, alone)
    adapted = F.normalize(enriched(None, enriched.prepare_knowledge(knowledge).blank(), text=plain).text, dim=-1)
    changed = (together - adapted).abs().amax(dim=1) > 1e-3
    assert changed.tolist() == [bool(item.triplets) for item in knowledge]


def test_search_scores_against_the_enriched_captions(clip_folder, shards, tmp_path):
    """Both directions by the public calls, pair by pair; pooled images too."""
    world = World(clip_folder, shards, tmp_path, text_enrichment=True)
    torch.manual_seed(5)
    torch.nn.init.normal_(world.model.text_enrichment.states.weight, std=0.3)
    retrieval, captions = world.retrieval(), world.captions
    rankings = retrieval.rank(world.model)
    with torch.no_grad():
        text = world.model.encode_text(world.model.tokenizer(captions.texts), True, captions.knowledge)
        for query in (0, 3):
            found = rankings["t2i"].first.candidates[query]
            images = world.model.encode_image(world.images[found], [captions.knowledge[query]] * len(found), True)
            torch.testing.assert_close(rankings["t2i"].scores[query], images @ text[query], rtol=0, atol=1e-5)
            found = rankings["i2t pairwise"].first.candidates[query]
            same = world.images[query].expand(len(found), -1, -1, -1)
            images = world.model.encode_image(same, [captions.knowledge[int(c)] for c in found], True)
            want = (images * text[found]).sum(-1)
            torch.testing.assert_close(rankings["i2t pairwise"].scores[query], want, rtol=0, atol=1e-5)
            pooled = world.model(
                world.images[query : query + 1], retrieval.knowledge[found], captions_a_pair=len(found)
            ).conditioned
            want = F.cosine_similarity(pooled, text[found], dim=-1)
            torch.testing.assert_close(rankings["i2t pooled"].scores[query], want, rtol=0, atol=1e-5)
