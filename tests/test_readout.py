"""Knowledge-conditioned readout against its equation, and what trains and ranks through it."""

import math

import pytest
import reference
import torch
import torch.nn.functional as F
from conftest import make_model
from test_evaluate import World

import amp
from amp.model.layers.readout import KnowledgeReadout
from amp.train.losses import pair_similarity
from amp.train.objective import Objective
from amp.train.stages import set_trainable, trainable_names

CAPTIONS = ["a dog jumps", "a small girl", "nothing", "men chase horses"]


def readout_model(**settings):
    return make_model(
        trained=True,
        interaction="readout",
        interaction_layer=1,
        text_enrichment=True,
        text_triplets=True,
        image_projection=True,
        **settings,
    )


@pytest.fixture
def model():
    return readout_model()


@pytest.fixture
def text(model, tokenizer):
    with torch.no_grad():
        return model.encode_text(tokenizer(CAPTIONS))


def naive(layer, patches, text, states, triplets, mask):
    """f(I, K) - f(I) of one image and one caption, query by query and head by head, in float64."""
    linear = lambda name, x: F.linear(x, layer[f"{name}.weight"], layer.get(f"{name}.bias"))  # noqa: E731
    queries = [linear("query_text", text / text.norm())]
    for k in mask.nonzero().flatten().tolist():
        queries.append(linear("query_text", states[k] / states[k].norm()) + linear("query_triplet", triplets[k]))
    key, value = linear("key", patches), linear("value", patches)
    answers = []
    for query in queries:
        heads = []
        for part in range(len(query) // layer["width"]):
            at = slice(part * layer["width"], (part + 1) * layer["width"])
            weights = torch.tensor([math.exp(float(query[at] @ k[at]) / math.sqrt(layer["width"])) for k in key])
            heads.append((weights.double() / weights.sum()) @ value[:, at])
        answers.append(torch.cat(heads))
    return linear("out", sum(answers) / len(answers))


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
        [torch.stack([naive(weights, p, text[c], states[c], triplets[c], mask[c]) for c in range(3)]) for p in patches]
    )
    queries = layer.queries(text, states, triplets, mask)
    torch.testing.assert_close(layer.all_pairs(patches, *queries), want, rtol=1e-6, atol=1e-6)
    image, caption = torch.tensor([1, 0, 1, 1]), torch.tensor([2, 1, 0, 2])
    pairs = layer.pairs(patches, queries[0][caption], queries[1][caption], image)
    torch.testing.assert_close(pairs, want[image, caption], rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_at_step_0_it_is_the_base_clip(images, knowledge, tokenizer):
    fresh = make_model(
        interaction="readout", interaction_layer=1, num_prompts=0, text_enrichment=True, image_projection=True
    )
    text = fresh.encode_text(tokenizer(CAPTIONS))
    torch.testing.assert_close(fresh.encode_image(images, knowledge, text=text), fresh.encode_image(images))
    torch.testing.assert_close(
        F.normalize(fresh.encode_text(tokenizer(CAPTIONS), knowledge=knowledge), dim=-1), F.normalize(text, dim=-1)
    )


@torch.no_grad()
def test_all_pairs_are_the_pairs_one_by_one(model, images, knowledge, text):
    batch = model.prepare_knowledge(knowledge)
    together = model(images, batch, text=text, all_pairs=True).conditioned
    assert together.shape == (4, 4, 24)
    for image in range(4):
        for caption in range(4):
            alone = model.encode_image(images[[image]], [knowledge[caption]], text=text[[caption]])[0]
            torch.testing.assert_close(together[image, caption], alone, rtol=1e-4, atol=1e-5)
    assert (together[:, 0] - together[:, 1]).abs().max() > 1e-2, "the caption hardly matters: the test can't fail"


@pytest.mark.parametrize("stage", [1, 2])
@torch.no_grad()
def test_the_loss_scores_every_pair_under_the_texts_own_knowledge(model, images, knowledge, text, stage):
    from amp.data.stream import Batch

    ids = torch.tensor([4, 8, 4, 6])
    batch = Batch(images, None, text, model.prepare_knowledge(knowledge), ids)
    enriched = model(None, batch.knowledge, text=text).text
    cosines = [
        [
            pair_similarity(model.encode_image(images[[i]], [knowledge[c]], text=text[[c]]), enriched[[c]]).item()
            for c in range(4)
        ]
        for i in range(4)
    ]
    loss, scale = Objective(stage, "contrastive", margin=0.3, all_pairs=True)(model, batch, step=0)
    want = reference.contrastive(cosines, scale.item(), ids) if stage == 1 else reference.triplet(cosines, 0.3, ids)
    assert loss.item() == pytest.approx(want, rel=1e-4)


@torch.no_grad()
def test_blocks_read_the_patches_before_the_interaction_layer(images, knowledge, tokenizer):
    """By torch's own transformer in training mode, whose fused path of inference it never takes."""
    model = readout_model(readout_blocks=2)
    layer, early = model.readout, model.encode_early(images)
    first, *blocks, last = layer.blocks
    seen = first(early[:, 1:])
    for block in blocks:
        assert block.self_attn.num_heads == model.backbone.vision_heads
        attended = block.norm1(seen)
        seen = seen + block.self_attn(attended, attended, attended, need_weights=True)[0]
        seen = seen + block.linear2(F.gelu(block.linear1(block.norm2(seen))))
    text = model.encode_text(tokenizer(CAPTIONS))
    queries = layer.queries(text, *model_queries(model, knowledge))
    want = model._pool(model._prompted_blocks(early))[0] + layer.pairs(last(seen), *queries, torch.arange(4))
    torch.testing.assert_close(model.encode_image(images, knowledge, text=text), want, rtol=1e-4, atol=1e-5)


def model_queries(model, knowledge):
    batch = model.prepare_knowledge(knowledge)
    return batch.states, model.encode_triplets(batch), batch.mask


@pytest.mark.parametrize("knowledge_setting", ["both", "triplets", "states", "template", "caption", "none"])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("blocks", [0, 1])
def test_a_step_gives_each_trainable_parameter_a_gradient(stage, knowledge_setting, blocks, images, knowledge, text):
    from amp.data.stream import Batch

    model = readout_model(knowledge=knowledge_setting, readout_blocks=blocks)
    names = trainable_names(model, stage)
    assert {n.partition(".")[0] for n in names} == {"readout"} if stage == 2 else "readout.key.weight" in names
    set_trainable(model, stage)
    conditioning = "none" if knowledge_setting == "none" else "contrastive"
    batch = Batch(images, None, text, model.prepare_knowledge(knowledge), torch.arange(4))
    Objective(stage, conditioning, margin=2.0, all_pairs=True)(model, batch, 0)[0].backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    # A constant added to all keys changes no softmax.
    rest = {"readout.key.bias", "triplet_encoder.null"}
    assert moved - rest == names - rest


@torch.no_grad()
def test_without_knowledge_only_the_control_has_a_query(model, images):
    plain = model(images, prompted=True).prompted
    torch.testing.assert_close(plain, model.read_patches(model.encode_early(images))[0])
    control = readout_model(knowledge="none")
    features, patches = control.read_patches(control.encode_early(images))
    key, value = control.readout.key(patches), control.readout.value(patches)
    weights = (key @ control.readout.query / math.sqrt(24)).softmax(dim=-1)
    want = features + torch.einsum("bm,bmd->bd", weights, value) @ control.readout.out.weight.T
    torch.testing.assert_close(control(images, prompted=True).prompted, want, rtol=1e-4, atol=1e-5)


def test_the_text_only_control_shows_images_nothing(images, knowledge, tokenizer):
    model = make_model(trained=True, condition_images=False, text_enrichment=True)
    assert not model.knowledge_aware and model.text_enrichment.states is not None
    assert {n.partition(".")[0] for n in model.adapter_state()} == {"logit_scale", "visual_prompts", "text_enrichment"}
    tokens = tokenizer(CAPTIONS)
    with torch.no_grad():
        plain, rich = model.encode_text(tokens, True), model.encode_text(tokens, True, knowledge)
    assert (plain - rich).abs().amax(dim=1).min() > 1e-3
    with pytest.raises(amp.AmpError, match="images see no knowledge"):
        model.encode_image(images, knowledge)


def test_search_equals_the_public_calls(clip_folder, shards, tmp_path):
    """Both directions, pair by pair, and pooled images by a loop over the candidates' queries."""
    world = World(
        clip_folder, shards, tmp_path, interaction="readout", text_enrichment=True, text_triplets=True, readout_blocks=1
    )
    torch.manual_seed(5)
    for weight in (world.model.readout.out.weight, world.model.text_enrichment.triplets.weight):
        torch.nn.init.normal_(weight, std=0.3)
    retrieval, captions, model = world.retrieval(), world.captions, world.model
    rankings = retrieval.rank(model)
    with torch.no_grad():
        tokens = model.tokenizer(captions.texts)
        plain, rich = model.encode_text(tokens), model.encode_text(tokens, True, captions.knowledge)
        for query in (0, 3):
            found = rankings["t2i"].first.candidates[query]
            n = len(found)
            images = model.encode_image(
                world.images[found], [captions.knowledge[query]] * n, True, text=plain[[query] * n]
            )
            torch.testing.assert_close(rankings["t2i"].scores[query], images @ rich[query], rtol=0, atol=1e-5)
            found = rankings["i2t pairwise"].first.candidates[query]
            same = world.images[query].expand(len(found), -1, -1, -1)
            images = model.encode_image(same, [captions.knowledge[int(c)] for c in found], True, text=plain[found])
            want = (images * rich[found]).sum(-1)
            torch.testing.assert_close(rankings["i2t pairwise"].scores[query], want, rtol=0, atol=1e-5)
            of_found = model.prepare_knowledge([captions.knowledge[int(c)] for c in found])
            prompts = model.encode_knowledge(of_found, plain[found])
            rows = prompts.queries[prompts.mask][None]
            features, patches = model.read_patches(model.encode_early(world.images[[query]]))
            ones = torch.ones(1, rows.shape[1], dtype=torch.bool)
            pooled = features + model.readout.pairs(patches, rows, ones, torch.tensor([0]))
            want = F.cosine_similarity(pooled, rich[found], dim=-1)
            torch.testing.assert_close(rankings["i2t pooled"].scores[query], want, rtol=0, atol=1e-5)


def test_what_cannot_be_built_is_refused_by_name(images, knowledge):
    with pytest.raises(amp.AmpError, match=r"readout.*class token"):
        make_model("average_pooled", interaction="readout")
    with pytest.raises(amp.AmpError, match=r"text is None.*encode_text"):
        readout_model().encode_image(images, knowledge)
    with pytest.raises(amp.AmpError, match="knowledge is 'caption' and interaction is 'aim'"):
        amp.PromptConfig(knowledge="caption")
    with pytest.raises(amp.AmpError, match=r"condition_images is false.*text_enrichment"):
        amp.PromptConfig(condition_images=False)
    for settings in ({"text_enrichment": True}, {"text_triplets": True}):
        with pytest.raises(amp.AmpError, match="condition_images is false"):
            amp.PromptConfig("triplets", condition_images=False, **settings)
    amp.PromptConfig("triplets", condition_images=False, text_enrichment=True, text_triplets=True)
    with pytest.raises(amp.AmpError, match="readout_blocks is -1"):
        amp.PromptConfig(readout_blocks=-1)
