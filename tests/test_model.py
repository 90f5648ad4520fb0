"""ActionAwareCLIP: bit-exact features of the base model without knowledge, the paper's equations with knowledge."""

import copy

import open_clip
import pytest
import torch
from support.equations.image_features import image_feature, prompts_of
from support.models import CLIP_VARIANTS, aim_settings, make_aim, make_clip, make_model
from torch.testing import assert_close

from amp.errors import AmpError
from amp.knowledge.schema import Knowledge
from amp.knowledge.tensors import Captions, KnowledgeBatch
from amp.knowledge.text import state_text
from amp.model.clip import ActionAwareCLIP, EncodedCaptions
from amp.model.config import PromptConfig
from amp.model.interactions.base import Prompts
from amp.train.stages import set_trainable

VARIANTS = sorted(CLIP_VARIANTS)
# Every tower, with prompts from its first, second or last block on.
TOWERS = [(variant, number % 3) for number, variant in enumerate(VARIANTS)]
ALL = torch.arange(4)


# -- the base model, bit for bit --------------------------------------------------------------------------------------


def frozen_clip(variant="native"):
    """The base model alone, with frozen weights, because torch's kernels for trainable weights round differently."""
    return make_clip(variant).requires_grad_(False)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_without_knowledge_it_is_its_base_model(variant, images, tokenizer):
    clip, model = frozen_clip(variant), make_aim(variant, trained=True)
    model.train()
    ids = tokenizer(["a dog jumps", "", "word " * 500])
    for norm in (False, True):
        assert torch.equal(model.encode_image(images, normalize=norm), clip.encode_image(images, normalize=norm))
        assert torch.equal(model.encode_text(ids, normalize=norm), clip.encode_text(ids, normalize=norm))


@pytest.mark.parametrize(("variant", "block"), TOWERS)
@torch.no_grad()
def test_action_aware_features_start_as_the_base_models(variant, block, images, knowledge):
    clip = frozen_clip(variant)
    model = make_aim(variant, block=block, num_prompts=0).train()
    assert torch.equal(model.encode_image(images, knowledge), clip.encode_image(images))


@pytest.mark.parametrize(("variant", "block"), TOWERS)
@torch.no_grad()
def test_conditioned_features_start_as_the_prompted_ones(variant, block, images, knowledge):
    model = make_aim(variant, block=block)
    features = model(images, Captions(model.prepare_knowledge(knowledge)), plain=ALL)
    assert torch.equal(features.conditioned, features.plain)
    assert torch.equal(features.plain, model.image_features(images))
    assert (features.plain - model.encode_image(images)).abs().max() > 1e-4  # visual prompts have an effect


def test_training_starts_at_the_base_model(images, knowledge):
    """With gradients torch uses other kernels, so features are equal except for rounding."""
    model = make_aim(num_prompts=0).train()
    features = model.encode_image(images, knowledge)
    assert features.requires_grad
    assert_close(features.detach(), frozen_clip().encode_image(images), atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_real_small_clip_starts_as_itself(clip_small, knowledge):
    clip, model = (open_clip.create_model(clip_small).eval().requires_grad_(False) for _ in range(2))
    tokenizer = open_clip.get_tokenizer(clip_small)
    model = ActionAwareCLIP(model, PromptConfig(**aim_settings(depth=0.667, num_prompts=0)), tokenizer).train()
    images = torch.randn(4, 3, 140, 140)
    assert torch.equal(model.encode_image(images), clip.encode_image(images))
    assert torch.equal(model.encode_image(images, knowledge), clip.encode_image(images))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@torch.no_grad()
def test_a_backbone_in_low_precision_starts_as_itself(dtype, images, knowledge):
    clip, model = frozen_clip(), make_aim(block=1, num_prompts=0)
    for m in (clip, model.backbone.clip):
        open_clip.convert_weights_to_lp(m, dtype)
    features = model.encode_image(images, knowledge)
    assert features.dtype == dtype and features.isfinite().all()
    assert torch.equal(features, clip.encode_image(images.to(dtype)))


# -- the equations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "residual", "block"),
    [
        ("native", True, 0),
        ("native", False, 2),
        ("average_pooled", True, 2),
        ("average_pooled", False, 1),
        ("attention_pooled", True, 1),
        ("layer_scale", False, 0),
    ],
)
@torch.no_grad()
def test_whole_model_is_the_papers(variant, residual, block, images, knowledge):
    """Compared with a naive loop over images, blocks, heads. With average pooling this fails if a prompt is pooled."""
    model = make_aim(variant, trained=True, block=block, options={"residual": residual}, num_prompts=3)
    batch = model.prepare_knowledge(knowledge)
    features = model(images, Captions(batch), plain=ALL)
    for i in range(4):
        expected = image_feature(model, images[i], prompts_of(model, batch, i))
        assert_close(features.conditioned[i], expected, atol=2e-5, rtol=1e-5)
        expected = image_feature(model, images[i])
        assert_close(features.plain[i], expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_states_and_triplets_both_count(images, knowledge):
    model = make_aim(trained=True)
    batch = model.prepare_knowledge(knowledge)
    expected = model(images, Captions(batch)).conditioned
    other_states = KnowledgeBatch(batch.triplet_tokens, batch.token_mask, batch.states.flip(1), batch.mask)
    other_triplets = KnowledgeBatch(batch.triplet_tokens.flip(3), batch.token_mask, batch.states, batch.mask)
    for changed in (other_states, other_triplets):
        assert (model(images, Captions(changed)).conditioned[1] - expected[1]).abs().max() > 1e-3


# -- masks ------------------------------------------------------------------------------------------------------------


def with_padding(batch, fill):
    """The same knowledge with other content at masked positions."""
    token_there = batch.token_mask & batch.mask[..., None, None]
    return KnowledgeBatch(
        torch.where(token_there, batch.triplet_tokens, fill),
        torch.where(batch.mask[..., None, None], batch.token_mask, True),
        torch.where(batch.mask[..., None], batch.states, 1e3 * fill),
        batch.mask,
    )


@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
def test_padding_content_changes_nothing(grad, images, knowledge):
    """The captions have 1, 3, 0 and K triplets."""
    model = make_aim(trained=True).train(grad)
    batch = model.prepare_knowledge(knowledge)
    assert batch.mask.sum(dim=1).tolist() == [1, 3, 0, model.config.max_triplets]
    with torch.set_grad_enabled(grad):
        expected = model(images, Captions(batch)).conditioned
        for fill in (1, 777):
            found = model(images, Captions(with_padding(batch, fill))).conditioned
            assert_close(found, expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_triplet_keeps_its_state_whatever_the_order(images, knowledge):
    model = make_aim(trained=True)
    item = knowledge[3]
    turned = Knowledge(item.triplets[:4][::-1], item.states[:4][::-1])
    straight = Knowledge(item.triplets[:4], item.states[:4])
    features = model.encode_image(images[:1].repeat(2, 1, 1, 1), [straight, turned])
    assert_close(features[0], features[1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_blank_knowledge_is_no_knowledge(images, knowledge):
    """The leak probe compares with blank knowledge."""
    model = make_aim(trained=True)
    blank = model(images, Captions(model.prepare_knowledge(knowledge).blank())).conditioned
    assert_close(blank, model.encode_image(images, [Knowledge()] * 4), atol=1e-6, rtol=0)


@pytest.mark.parametrize("residual", [False, True], ids=["literal", "gated"])
def test_a_caption_without_knowledge_has_finite_features_and_gradients(residual, images):
    model = make_aim(trained=True, options={"residual": residual})
    features = model.encode_image(images, [Knowledge()] * 4)
    features.square().sum().backward()
    assert features.isfinite().all()
    for name, parameter in model.named_parameters():
        if not name.startswith(("backbone.", "logit_scale")):
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("empty", [False, True])
def test_null_tokens_learn_only_from_captions_without_knowledge(empty, images, knowledge):
    model = make_aim(trained=True)
    model.encode_image(images[:2], [knowledge[0], knowledge[2] if empty else knowledge[1]]).square().sum().backward()
    for null in (model.triplet_encoder.null, model.interaction.null_state):
        assert (null.grad.abs().max() > 0) == empty  # zero instead of None, because DDP waits for every parameter


# -- unions -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_union_is_the_captions_prompts_side_by_side(images, knowledge):
    """i2t `pooled`: captions 0 and 1 condition image 3; captions 3 and 2 condition image 0, in any order."""
    model = make_aim(trained=True, block=1)
    prompts = model(None, Captions(model.prepare_knowledge(knowledge))).captions.prompts
    early = model.tower.early(images)
    for order in ([0, 1, 3, 2], [1, 0, 2, 3]):
        united = prompts.take(torch.tensor(order)).unite(2)
        features = model(early[[3, 0]], EncodedCaptions(united, None)).conditioned
        for row, (image, members) in enumerate([(3, [0, 1]), (0, [3, 2])]):
            parts = tuple(torch.cat([x[m][prompts.mask[m]] for m in members])[None] for x in prompts.parts)
            mask = torch.ones(1, parts[0].shape[1], dtype=torch.bool)
            assert mask.shape[1] == {0: 1 + 3, 1: 6 + 1}[row]
            expected = model(early[[image]], EncodedCaptions(Prompts(parts, mask), None)).conditioned
            assert_close(features[row], expected[0], atol=1e-5, rtol=1e-5)


# -- forward ----------------------------------------------------------------------------------------------------------


def test_frozen_part_is_the_base_model_and_can_be_passed_back(images, knowledge):
    model = make_aim(trained=True, block=2)
    captions = Captions(model.prepare_knowledge(knowledge))
    frozen = model(images)
    assert torch.equal(frozen.base, model.encode_image(images))
    assert not frozen.base.requires_grad and not frozen.early.requires_grad
    assert frozen.conditioned is None and frozen.plain is None
    whole, cached = (model(x, captions, plain=torch.tensor([2])) for x in (images, frozen.early))
    assert torch.equal(whole.conditioned, cached.conditioned) and torch.equal(whole.plain, cached.plain)
    assert_close(whole.plain, model.image_features(images)[2:3], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_stored_tokens_in_half_precision_enter_the_blocks_in_theirs(images, knowledge):
    model = make_aim(trained=True, block=1)
    captions, early = Captions(model.prepare_knowledge(knowledge)), model.tower.early(images).half()
    found = model(early, captions, plain=ALL)
    expected = model(early.float(), captions, plain=ALL)
    assert torch.equal(found.conditioned, expected.conditioned) and torch.equal(found.plain, expected.plain)


@pytest.mark.parametrize("settings", [aim_settings(block=1), {"depth": 0.3}], ids=["aim", "readout"])
def test_activation_checkpointing_changes_no_gradient(settings, images, knowledge, tokenizer):
    gradients = []
    for recompute in (False, True):
        model = make_model(trained=True, **settings)
        model.tower.recompute = recompute
        set_trainable(model, 1)
        text = model.encode_text(tokenizer(["a dog", "a girl", "nothing", "men"]))
        features = model(images, Captions(model.prepare_knowledge(knowledge), text), plain=ALL)
        (features.conditioned * features.plain).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 20
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_a_copy_is_a_model_of_its_own(images, knowledge):
    """The copy includes the tower, which is not a module but contains modules."""
    model = make_aim(trained=True, block=1)
    copied, before = copy.deepcopy(model), model.encode_image(images, knowledge)
    copied.visual_prompts.prompts.data *= -3
    assert copied.tower.visual_prompts is copied.visual_prompts and copied.tower.backbone is copied.backbone
    assert torch.equal(model.encode_image(images, knowledge), before)
    assert (copied.encode_image(images, knowledge) - before).abs().max() > 1e-3


@pytest.mark.parametrize(("log_scale", "expected"), [(-1.0, 1.0), (2.0, 7.389056), (9.0, 100.0)])
def test_temperature_is_clamped_and_single_precision(log_scale, expected, images, knowledge):
    model = make_model(knowledge="none")
    captions = Captions(model.prepare_knowledge(knowledge))
    model.logit_scale.data.fill_(log_scale)
    scale = model.bfloat16()(images, captions).logit_scale
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
    model = make_aim(trained=True)
    expected = model.encode_image(images, knowledge, normalize=True)
    assert torch.equal(model.encode_image(images, model.prepare_knowledge(knowledge), normalize=True), expected)
    assert_close(expected.norm(dim=1), torch.ones(4))


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "block"), [(0.0, 0), (0.34, 1), (0.6, 2), (0.99, 2)])
def test_depth_is_a_fraction_of_the_towers_blocks(depth, block):
    model = make_model(depth=depth)
    assert model.tower.first == block and len(model.visual_prompts.prompts) == 3 - block
    assert PromptConfig().first_block(12) == 8


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("depth", -0.1),
        ("depth", 1.0),
        ("depth", float("nan")),
        ("num_prompts", -1),
        ("max_triplets", 0),
        ("knowledge", "some"),
    ],
)
def test_senseless_settings_are_refused(key, value):
    with pytest.raises(AmpError, match=rf"prompt setting {key} is {value!r}, expected"):
        PromptConfig(**{key: value})


def test_one_caption_an_image(images, knowledge):
    with pytest.raises(AmpError, match="knowledge of 4 captions for 3 images, expected one each"):
        make_model().encode_image(images[:3], knowledge)
    with pytest.raises(AmpError, match="knowledge of 1 captions for 2 texts, expected one each"):
        make_model().encode_text(torch.zeros(2, 77, dtype=torch.long), knowledge=knowledge[:1])
    with pytest.raises(AmpError, match="knowledge holds None, expected amp"):
        make_model().encode_image(images[:1], [None])


def test_knowledge_as_text_needs_a_tokenizer(images, knowledge):
    with pytest.raises(AmpError, match="without a tokenizer; pass tokenizer="):
        ActionAwareCLIP(make_clip()).encode_image(images, knowledge)
