"""Knowledge-conditioned readout: compared with its equation, in training and in search."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.equations import layers, losses
from support.models import aim_settings, make_model

from amp.data.frozen_features import FrozenFeatures
from amp.data.split_captions import SplitCaptions
from amp.data.stream import Batch
from amp.knowledge.tensors import Captions
from amp.model.layers.readout import KnowledgeReadout
from amp.model.similarity import pair_similarity
from amp.retrieval.settings import RetrievalSettings
from amp.retrieval.split_search import SplitSearch
from amp.train.objective import Objective
from amp.train.stages import set_trainable, trainable_names

CAPTIONS = ["a dog jumps", "a small girl", "nothing", "men chase horses"]


def readout_model(blocks=0, **settings):
    return make_model(trained=True, depth=1 / 3, num_prompts=4, interaction_options={"blocks": blocks}, **settings)


@pytest.fixture
def model():
    return readout_model()


@pytest.fixture
def text(model, tokenizer):
    with torch.no_grad():
        return model.encode_text(tokenizer(CAPTIONS))


@pytest.mark.parametrize(("width", "heads"), [(24, 1), (128, 2), (96, 2)])
@torch.no_grad()
def test_the_equation_by_a_naive_loop(width, heads):
    torch.manual_seed(0)
    layer = KnowledgeReadout(vision_width=32, embed_dim=width, triplet_width=40).double()
    layer.out.weight.normal_()
    patches, text, states = torch.randn(2, 5, 32), torch.randn(3, width), torch.randn(3, 4, width)
    patches, text, states, triplets = (x.double() for x in (patches, text, states, torch.randn(3, 4, 40)))
    mask = torch.tensor([[True, True, False, False], [False] * 4, [True] * 4])
    weights = {**layer.state_dict(), "width": width // layer.heads}
    assert layer.heads == heads
    want = torch.stack(
        [
            torch.stack([layers.readout(weights, p, text[c], states[c], triplets[c], mask[c]) for c in range(3)])
            for p in patches
        ]
    )
    queries = layer.queries(text, states, triplets, mask)
    key, value = layer.keys_and_values(patches)
    torch.testing.assert_close(layer.all_pairs(key, value, *queries), want, rtol=1e-6, atol=1e-6)
    image, caption = torch.tensor([1, 0, 1, 1]), torch.tensor([2, 1, 0, 2])
    pairs = layer.pairs(key[image], value[image], queries[0][caption], queries[1][caption])
    torch.testing.assert_close(pairs, want[image, caption], rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_at_step_0_it_is_the_base_clip(images, knowledge, tokenizer):
    fresh = make_model(num_prompts=0)
    text = fresh.encode_text(tokenizer(CAPTIONS))
    assert torch.equal(fresh.encode_image(images, knowledge, text=text), fresh.encode_image(images))
    torch.testing.assert_close(
        F.normalize(fresh.encode_text(tokenizer(CAPTIONS), knowledge=knowledge), dim=-1), F.normalize(text, dim=-1)
    )


@pytest.mark.parametrize("stage", [1, 2])
@torch.no_grad()
def test_the_loss_scores_every_pair_under_the_texts_own_knowledge(model, images, knowledge, text, stage):
    ids = torch.tensor([4, 8, 4, 6])
    batch = Batch(images, None, text, model.prepare_knowledge(knowledge), ids)
    enriched = model(None, Captions(batch.knowledge, text)).captions.text
    cosines = [
        [
            pair_similarity(model.encode_image(images[[i]], [knowledge[c]], text=text[[c]]), enriched[[c]]).item()
            for c in range(4)
        ]
        for i in range(4)
    ]
    loss, scale = Objective(stage, model.interaction, margin=0.3)(model, batch, step=0)
    want = losses.contrastive(cosines, scale.item(), ids) if stage == 1 else losses.triplet(cosines, 0.3, ids)
    assert loss.item() == pytest.approx(want, rel=1e-4)


@torch.no_grad()
def test_blocks_read_the_patches_before_the_first_prompted_block(images, knowledge, tokenizer):
    """Compared with torch's transformer in training mode, which doesn't use the fused path."""
    model = readout_model(blocks=2)
    layer, early = model.interaction.readout, model.tower.early(images)
    first, *blocks, last = layer.blocks
    seen = first(early[:, 1:])
    for block in blocks:
        assert block.self_attn.num_heads == model.backbone.vision_heads
        attended = block.norm1(seen)
        seen = seen + block.self_attn(attended, attended, attended, need_weights=True)[0]
        seen = seen + block.linear2(F.gelu(block.linear1(block.norm2(seen))))
    text, batch = model.encode_text(tokenizer(CAPTIONS)), model.prepare_knowledge(knowledge)
    queries = layer.queries(text, batch.states, model.encode_triplets(batch), batch.mask)
    want = model.tower.features(early) + layer.pairs(*layer.keys_and_values(last(seen)), *queries)
    torch.testing.assert_close(model.encode_image(images, knowledge, text=text), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("knowledge_setting", "blocks"),
    [("both", 1), ("triplets", 1), ("states", 0), ("template", 0), ("caption", 0), ("none", 0)],
)
def test_a_step_gives_each_trainable_parameter_a_gradient(knowledge_setting, blocks, images, knowledge, text):
    model = readout_model(blocks, knowledge=knowledge_setting)
    batch = Batch(images, None, text, model.prepare_knowledge(knowledge), torch.arange(4))
    first, second = trainable_names(model, 1), trainable_names(model, 2)
    assert "image_projection.weight" in first and {n.partition(".")[0] for n in second} == {"interaction"}
    for stage, names in ((1, first), (2, second)):
        model.zero_grad()
        set_trainable(model, stage)
        Objective(stage, model.interaction, margin=2.0)(model, batch, 0)[0].backward()
        moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        # A constant added to all keys doesn't change the softmax.
        rest = {"interaction.readout.key.bias", "triplet_encoder.null"}
        assert moved - rest == names - rest


@torch.no_grad()
def test_only_the_control_has_a_query_of_its_own(model, images):
    early = model.tower.early(images)
    torch.testing.assert_close(model.image_features(images), model.tower.features(early))
    control = readout_model(knowledge="none")
    layer = control.interaction.readout
    features, patches = control.tower.features_and_patches(control.tower.early(images), all_tokens=True)
    weights = (layer.key(patches) @ layer.query / math.sqrt(24)).softmax(dim=-1)
    want = features + torch.einsum("bm,bmd->bd", weights, layer.value(patches)) @ layer.out.weight.T
    torch.testing.assert_close(control.image_features(images), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{"depth": 1 / 3}, aim_settings(block=1, enrich=True)], ids=["readout", "aim"])
@torch.no_grad()
def test_search_equals_the_public_calls(settings, images, knowledge, tokenizer):
    """Both directions with enriched captions, pair by pair, and pooled images with the joined prompts."""
    model, k = make_model(trained=True, **settings).eval(), 3
    texts, items = [*CAPTIONS, "a girl studies"], [*knowledge, knowledge[1]]
    plain, batch = model.encode_text(tokenizer(texts)), model.prepare_knowledge(items)
    rich = model.encode_text(tokenizer(texts), True, items)
    frozen = model(images)
    search = SplitSearch(
        SplitCaptions(texts, items, torch.tensor([0, 1, 2, 3, 1]), 4),
        FrozenFeatures(frozen.early.numpy(), frozen.base.numpy()),
        plain,
        batch,
        RetrievalSettings(top_k=k),
        torch.device("cpu"),
    )
    found = search.rank(model)
    prompts = model(None, Captions(batch, plain)).captions.prompts
    for query in range(4):
        chosen = found.t2i.first.candidates[query]
        seen = model.encode_image(images[chosen], [items[query]] * k, True, text=plain[[query] * k])
        torch.testing.assert_close(found.t2i.scores[query], seen @ rich[query], rtol=0, atol=1e-5)
        pairwise, pooled = found.i2t["pairwise"], found.i2t["pooled"]
        chosen = pairwise.first.candidates[query]
        same = images[query].expand(k, -1, -1, -1)
        seen = model.encode_image(same, [items[int(c)] for c in chosen], True, text=plain[chosen])
        torch.testing.assert_close(pairwise.scores[query], (seen * rich[chosen]).sum(-1), rtol=0, atol=1e-5)
        there = [prompts.mask[c] for c in chosen]
        parts = tuple(torch.cat([x[c][m] for c, m in zip(chosen, there, strict=True)])[None] for x in prompts.parts)
        joined = type(prompts)(parts, torch.ones(1, parts[0].shape[1], dtype=torch.bool))
        stored = model(frozen.early[[query]]).images
        one = model.interaction.pairs(model.tower, stored, joined, torch.tensor([0]))
        want = F.cosine_similarity(one, rich[chosen], dim=-1)
        torch.testing.assert_close(pooled.scores[query], want, rtol=0, atol=1e-5)
    for ranking in (found.t2i, pairwise, pooled):
        assert (ranking.scores - ranking.first.scores).abs().max() > 1e-3
