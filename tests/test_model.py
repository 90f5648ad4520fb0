"""ActionAwareCLIP: the base model's own bits where it must be, the paper's equations where knowledge comes in."""

import open_clip
import pytest
import reference
import torch
from conftest import CLIP_VARIANTS, make_clip, make_model
from torch.testing import assert_close

from amp.errors import AmpError
from amp.knowledge.schema import Knowledge
from amp.knowledge.tensors import KnowledgeBatch
from amp.knowledge.text import state_text
from amp.model.clip import ActionAwareCLIP
from amp.model.config import PromptConfig
from amp.train.stages import set_trainable

VARIANTS = sorted(CLIP_VARIANTS)
PAIRS = torch.tensor([0, 1, 2, 3])


# -- the base model, bit for bit --------------------------------------------------------------------------------------


def frozen_clip(variant="native"):
    """The base model alone; frozen as ours, since torch's kernels for weights that want gradients round differently."""
    return make_clip(variant).requires_grad_(False)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_without_knowledge_it_is_its_base_model(variant, normalize, images, tokenizer):
    clip, model = frozen_clip(variant), make_model(variant, trained=True)
    model.train()
    ids = tokenizer(["a dog jumps", "", "word " * 500])
    assert torch.equal(model.encode_image(images, normalize=normalize), clip.encode_image(images, normalize=normalize))
    assert torch.equal(model.encode_text(ids, normalize=normalize), clip.encode_text(ids, normalize=normalize))


@pytest.mark.parametrize("interaction_layer", [0, 1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_action_aware_features_start_as_the_base_models(variant, interaction_layer, images, knowledge):
    clip = frozen_clip(variant)
    model = make_model(variant, num_prompts=0, interaction_layer=interaction_layer).train()
    assert torch.equal(model.encode_image(images, knowledge), clip.encode_image(images))


@pytest.mark.parametrize("interaction_layer", [0, 2])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_conditioned_features_start_as_the_prompted_ones(variant, interaction_layer, images, knowledge):
    model = make_model(variant, interaction_layer=interaction_layer)
    features = model(images, model.prepare_knowledge(knowledge), prompted=True)
    assert torch.equal(features.conditioned, features.prompted)
    assert (features.prompted - model.encode_image(images)).abs().max() > 1e-4  # the visual prompts are there


@pytest.mark.parametrize("interaction_layer", [0, 2])
def test_training_starts_at_the_base_model(interaction_layer, images, knowledge):
    """With gradients, through other kernels, equal but for rounding."""
    model = make_model(num_prompts=0, interaction_layer=interaction_layer).train()
    features = model.encode_image(images, knowledge)
    assert features.requires_grad
    assert_close(features.detach(), frozen_clip().encode_image(images), atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_real_small_clip_starts_as_itself(clip_small, knowledge):
    clip, model = (open_clip.create_model(clip_small).eval().requires_grad_(False) for _ in range(2))
    tokenizer = open_clip.get_tokenizer(clip_small)
    model = ActionAwareCLIP(model, PromptConfig(num_prompts=0, interaction_layer=8), tokenizer).train()
    images = torch.randn(4, 3, 140, 140)
    assert torch.equal(model.encode_image(images), clip.encode_image(images))
    assert torch.equal(model.encode_image(images, knowledge), clip.encode_image(images))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@torch.no_grad()
def test_a_backbone_in_low_precision_starts_as_itself(dtype, images, knowledge):
    clip, model = frozen_clip(), make_model(num_prompts=0, interaction_layer=1)
    for m in (clip, model.backbone.clip):
        open_clip.convert_weights_to_lp(m, dtype)
    features = model.encode_image(images, knowledge)
    assert features.dtype == dtype and features.isfinite().all()
    assert torch.equal(features, clip.encode_image(images.to(dtype)))


# -- the equations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interaction_layer", [0, 1, 2])
@pytest.mark.parametrize("residual", [False, True], ids=["literal", "gated"])
@pytest.mark.parametrize("variant", ["native", "average_pooled", "attention_pooled", "layer_scale"])
@torch.no_grad()
def test_whole_model_is_the_papers(variant, residual, interaction_layer, images, knowledge):
    """Against a naive loop over images, blocks and heads. With average pooling it fails if a prompt is pooled."""
    model = make_model(variant, trained=True, residual=residual, interaction_layer=interaction_layer, num_prompts=3)
    batch = model.prepare_knowledge(knowledge)
    features = model(images, batch, prompted=True)
    for i in range(4):
        expected = reference.action_aware_feature(model, images[i], batch, i)
        assert_close(features.conditioned[i], expected, atol=2e-5, rtol=1e-5)
        expected = reference.action_aware_feature(model, images[i], batch, i, conditioned=False)
        assert_close(features.prompted[i], expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_knowledge_counts(images, knowledge):
    """Guards the tests that say something changes nothing: other knowledge does change features."""
    model = make_model(trained=True)
    features = model.encode_image(images, knowledge)
    other = model.encode_image(images, [*knowledge[1:], knowledge[0]])
    assert ((features - other).abs().amax(dim=1) > 1e-3).all()


@torch.no_grad()
def test_states_and_triplets_both_count(images, knowledge):
    model = make_model(trained=True)
    batch = model.prepare_knowledge(knowledge)
    expected = model(images, batch).conditioned
    other_states = KnowledgeBatch(batch.triplet_tokens, batch.token_mask, batch.states.flip(1), batch.mask)
    other_triplets = KnowledgeBatch(batch.triplet_tokens.flip(3), batch.token_mask, batch.states, batch.mask)
    for changed in (other_states, other_triplets):
        assert (model(images, changed).conditioned[1] - expected[1]).abs().max() > 1e-3


# -- masks ------------------------------------------------------------------------------------------------------------


def with_padding(batch, fill):
    """The same knowledge with other content where the masks say there is none."""
    token_there = batch.token_mask & batch.mask[..., None, None]
    return KnowledgeBatch(
        torch.where(token_there, batch.triplet_tokens, fill),
        torch.where(batch.mask[..., None, None], batch.token_mask, True),
        torch.where(batch.mask[..., None], batch.states, 1e3 * fill),
        batch.mask,
    )


@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
def test_padding_content_changes_nothing(grad, images, knowledge):
    """Captions with 1, 3, 0 and K triplets."""
    model = make_model(trained=True).train(grad)
    batch = model.prepare_knowledge(knowledge)
    assert batch.mask.sum(dim=1).tolist() == [1, 3, 0, model.config.max_triplets]
    with torch.set_grad_enabled(grad):
        expected = model(images, batch).conditioned
        for fill in (1, 777):
            assert_close(model(images, with_padding(batch, fill)).conditioned, expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_more_padding_changes_nothing(images, knowledge):
    """The same captions padded to K = 6 and to K = 11."""
    model = make_model(trained=True)
    batch = model.prepare_knowledge(knowledge)
    padded = batch.map(lambda x: torch.cat([x, x.new_zeros(4, 5, *x.shape[2:])], dim=1))
    assert padded.mask.shape == (4, 11)
    assert_close(model(images, padded).conditioned, model(images, batch).conditioned, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_triplets_are_a_set(images, knowledge):
    model = make_model(trained=True)
    batch = model.prepare_knowledge(knowledge)
    order = torch.tensor([4, 2, 0, 5, 3, 1])
    shuffled = batch.map(lambda x: x[:, order])
    assert not torch.equal(shuffled.mask, batch.mask)  # gaps between triplets are allowed
    assert_close(model(images, shuffled).conditioned, model(images, batch).conditioned, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_triplet_keeps_its_state_whatever_the_order(images, knowledge):
    model = make_model(trained=True)
    item = knowledge[3]
    turned = Knowledge(item.triplets[:4][::-1], item.states[:4][::-1])
    straight = Knowledge(item.triplets[:4], item.states[:4])
    features = model.encode_image(images[:1].repeat(2, 1, 1, 1), [straight, turned])
    assert_close(features[0], features[1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_blank_knowledge_is_no_knowledge(images, knowledge):
    """What the leak probe compares with."""
    model = make_model(trained=True)
    blank = model(images, model.prepare_knowledge(knowledge).blank()).conditioned
    assert_close(blank, model.encode_image(images, [Knowledge()] * 4), atol=1e-6, rtol=0)


@pytest.mark.parametrize("residual", [False, True], ids=["literal", "gated"])
def test_a_caption_without_knowledge_has_finite_features_and_gradients(residual, images):
    model = make_model(trained=True, residual=residual)
    features = model.encode_image(images, [Knowledge()] * 4)
    features.square().sum().backward()
    assert features.isfinite().all()
    for name, parameter in model.named_parameters():
        if not name.startswith(("backbone.", "logit_scale")):
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("empty", [False, True])
def test_null_tokens_learn_only_from_captions_without_knowledge(empty, images, knowledge):
    model = make_model(trained=True)
    model.encode_image(images[:2], [knowledge[0], knowledge[2] if empty else knowledge[1]]).square().sum().backward()
    for null in (model.triplet_encoder.null, model.null_state):
        assert (null.grad.abs().max() > 0) == empty  # a gradient of zero, not none: DDP waits for every parameter


def test_every_parameter_of_a_stage_has_a_gradient_and_the_backbone_none(images, knowledge):
    """Distributed engines fail on parameters that take no part."""
    for settings in ({}, {"num_prompts": 0}, {"residual": False}, {"interaction_layer": 2}):
        model = make_model(trained=True, **settings)
        for stage in (1, 2):
            model.zero_grad()
            expected = {id(p) for p in set_trainable(model, stage)}
            features = model(images, model.prepare_knowledge(knowledge))
            (features.logit_scale * features.conditioned.square().sum()).backward()
            seen = {id(p) for p in model.parameters() if p.grad is not None}
            empty = {id(p) for p in model.parameters() if p.numel() == 0}
            assert seen | empty == expected | empty


# -- pairs and unions -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_pairs_are_what_single_calls_give(images, knowledge):
    model = make_model(trained=True, interaction_layer=1)
    batch = model.prepare_knowledge(knowledge)
    image_index, knowledge_index = torch.tensor([0, 0, 3, 1, 2]), torch.tensor([1, 2, 0, 3, 3])
    pairs = model(images, batch, image_index, knowledge_index).conditioned
    for row, (i, c) in enumerate(zip(image_index, knowledge_index, strict=True)):
        single = model.encode_image(images[i : i + 1], [knowledge[c]])[0]
        assert_close(pairs[row], single, atol=1e-5, rtol=1e-5)
    prompts = model.encode_knowledge(batch)
    assert_close(model(images, prompts, image_index, knowledge_index).conditioned, pairs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_union_is_the_captions_prompts_side_by_side(images, knowledge):
    """i2t `pooled`: captions 0 and 1 condition image 3, captions 3 and 2 image 0."""
    model = make_model(trained=True, interaction_layer=1)
    prompts = model.encode_knowledge(model.prepare_knowledge(knowledge))
    index = torch.tensor([0, 1, 3, 2])
    early = model.encode_early(images)
    features = model(early, prompts, torch.tensor([3, 0]), index, captions_a_pair=2).conditioned
    for row, (image, members) in enumerate([(3, [0, 1]), (0, [3, 2])]):
        parts = [[x[m][prompts.mask[m]] for m in members] for x in prompts if x is not None]
        triplets, states, mask = (torch.cat(part)[None] for part in parts)
        assert mask.all() and mask.shape[1] == {0: 1 + 3, 1: 6 + 1}[row]
        expected = model.encode_pairs(early, type(prompts)(triplets, states, mask), torch.tensor([image]))
        assert_close(features[row], expected[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_order_within_a_union_does_not_matter(images, knowledge):
    model = make_model(trained=True)
    batch = model.prepare_knowledge(knowledge)
    one, other = (
        model(images[:1], batch, torch.tensor([0]), torch.tensor(order), captions_a_pair=4).conditioned
        for order in ([0, 1, 2, 3], [2, 3, 1, 0])
    )
    assert_close(one, other, atol=1e-5, rtol=1e-5)


# -- forward ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interaction_layer", [0, 2])
def test_frozen_part_is_the_base_model_and_can_be_passed_back(interaction_layer, images, knowledge):
    model = make_model(trained=True, interaction_layer=interaction_layer)
    batch = model.prepare_knowledge(knowledge)
    frozen = model(images, only_frozen=True)
    assert torch.equal(frozen.base, model.encode_image(images))
    assert not frozen.base.requires_grad and not frozen.early.requires_grad
    assert frozen.conditioned is None and frozen.prompted is None
    again = model(frozen.early, only_frozen=True)
    assert torch.equal(again.base, frozen.base)
    whole, cached = (model(x, batch, prompted=True) for x in (images, frozen.early))
    assert torch.equal(whole.early, frozen.early)
    assert torch.equal(whole.conditioned, cached.conditioned) and torch.equal(whole.prompted, cached.prompted)


def test_activation_checkpointing_changes_no_gradient(images, knowledge):
    gradients = []
    for recompute in (False, True):
        model = make_model(trained=True)
        model.activation_checkpointing = recompute
        set_trainable(model, 1)
        features = model(images, model.prepare_knowledge(knowledge), prompted=True)
        (features.conditioned * features.prompted).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 20
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize(("log_scale", "expected"), [(-1.0, 1.0), (2.0, 7.389056), (9.0, 100.0)])
def test_temperature_is_clamped_and_single_precision(log_scale, expected, images):
    model = make_model(knowledge="none")
    model.logit_scale.data.fill_(log_scale)
    scale = model.bfloat16()(images, prompted=True).logit_scale
    assert scale.shape == (1,) and scale.dtype == torch.float32
    assert scale.item() == pytest.approx(expected, rel=1e-5)


def test_temperature_starts_at_the_base_models():
    clip = make_clip()
    clip.logit_scale.data.fill_(3.25)
    model = ActionAwareCLIP(clip)
    assert model.logit_scale.tolist() == [3.25]
    model.logit_scale.data += 1
    assert clip.logit_scale.item() == 3.25


# -- knowledge given as text ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_prepared_states_are_the_text_towers_features(knowledge, tokenizer):
    model = make_model()
    batch = model.prepare_knowledge(knowledge)
    girl = knowledge[1]
    order = [1, 2, 0]  # actions before the attribute
    texts = [state_text(girl.triplets[k], girl.states[k]) for k in order]
    assert texts[0].startswith("Fine-grained state description of action triplet <girl, studies, laptop> is The girl")
    assert_close(batch.states[1, :3], model.encode_text(tokenizer(texts)), atol=1e-5, rtol=0)
    assert (batch.states[~batch.mask] == 0).all()
    assert not batch.states.requires_grad


def test_knowledge_as_objects_or_tensors(images, knowledge):
    model = make_model(trained=True)
    expected = model.encode_image(images, knowledge, normalize=True)
    assert torch.equal(model.encode_image(images, model.prepare_knowledge(knowledge), normalize=True), expected)
    assert_close(expected.norm(dim=1), torch.ones(4))


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [3, 40])
def test_interaction_layer_outside_the_tower_is_refused(layer):
    with pytest.raises(AmpError, match=rf"interaction_layer is {layer}, expected 0 to 2: the image tower has 3 blocks"):
        make_model(interaction_layer=layer)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("interaction_layer", -1),
        ("num_prompts", -1),
        ("max_triplets", 0),
        ("slot_tokens", 0),
        ("triplet_layers", 0),
        ("triplet_heads", 0),
        ("bottleneck", 0),
        ("lam", 1.5),
        ("lam", float("nan")),
        ("knowledge", "some"),
    ],
)
def test_senseless_settings_are_refused(key, value):
    with pytest.raises(AmpError, match=rf"prompt setting {key} is {value!r}, expected"):
        PromptConfig(**{key: value})


def test_a_control_with_nothing_to_train_is_refused():
    with pytest.raises(AmpError, match="num_prompts 0 leaves nothing to train"):
        PromptConfig(knowledge="none", num_prompts=0)


def test_heads_that_do_not_divide_the_text_width_are_refused():
    with pytest.raises(AmpError, match="triplet_heads is 7, expected a divisor of the text width 40; choose 1"):
        make_model(triplet_heads=7)


def test_one_caption_an_image(images, knowledge):
    with pytest.raises(AmpError, match="knowledge of 4 captions for 3 images, expected one each"):
        make_model().encode_image(images[:3], knowledge)
    with pytest.raises(AmpError, match="knowledge of 1 captions for 2 texts, expected one each"):
        make_model().encode_text(torch.zeros(2, 77, dtype=torch.long), knowledge=knowledge[:1])
    with pytest.raises(AmpError, match="knowledge holds None, expected amp"):
        make_model().encode_image(images[:1], [None])


def test_the_control_has_no_use_for_knowledge(images, knowledge):
    model = make_model(knowledge="none")
    assert set(model.adapter_state()) == {"logit_scale", "visual_prompts.prompts"}
    batch = make_model().prepare_knowledge(knowledge)
    for call in (lambda: model.encode_image(images, batch), lambda: model.encode_pairs(images, batch, PAIRS)):
        with pytest.raises(AmpError, match="images see no knowledge"):
            call()


def test_knowledge_as_text_needs_a_tokenizer(images, knowledge):
    with pytest.raises(AmpError, match="without a tokenizer; pass tokenizer="):
        ActionAwareCLIP(make_clip()).encode_image(images, knowledge)
