"""Architectures of the paper's Tables 2 and 3, each compared with a naive reference."""

import pytest
import torch
from support.equations.image_features import feature_under, sentences
from support.models import aim_settings, clip_config, make_aim, make_clip
from torch.testing import assert_close

import amp
from amp.data.prepare import knowledge_collator
from amp.data.split_captions import SplitCaptions
from amp.data.stream import Batch
from amp.data.text_features import encode_missing
from amp.errors import AmpError
from amp.evaluate.run import evaluate
from amp.evaluate.settings import EvaluationSettings
from amp.knowledge.tensors import Captions
from amp.knowledge.text import tower_texts
from amp.model.adapter import save_adapter
from amp.model.clip import ActionAwareCLIP, EncodedCaptions
from amp.model.config import PromptConfig
from amp.retrieval.settings import RetrievalSettings
from amp.train.objective import Objective
from amp.train.stages import set_trainable, trainable_names

# -- architectures, compared with loops over pairs --------------------------------------------------------------------

SINGLE = ("triplets", "template", "states")
LITERAL, CAT = {"options": {"residual": False}}, {"interaction": "cat"}
# Each kind of knowledge, each interaction, and one and two kinds of prompts in AIM and in `cat`.
VARIANTS = [{}, {"knowledge": "triplets"}, {"knowledge": "states", **LITERAL}, {"knowledge": "template", **CAT}, CAT]
IMAGE, CAPTION = torch.tensor([0, 0, 3, 1, 2]), torch.tensor([1, 2, 0, 3, 3])


def label(settings) -> str | None:
    if isinstance(settings, dict):
        return "-".join("literal" if key == "options" else str(value) for key, value in settings.items()) or "aim"
    return None


@pytest.mark.parametrize(
    ("clip", "block", "visual", "settings"),
    [
        # AIM: each kind of knowledge, gated and literal; test_model.py tests it on every tower
        ("native", 0, 3, {}),
        ("native", 0, 3, {"knowledge": "triplets"}),
        ("layer_scale", 0, 0, {"knowledge": "template"}),
        ("average_pooled", 1, 2, {"knowledge": "states"}),
        ("attention_pooled", 1, 0, {"knowledge": "triplets", **LITERAL}),
        ("native", 2, 0, {"knowledge": "template", **LITERAL}),
        ("native", 0, 3, {"knowledge": "states", **LITERAL}),
        # `cat`: each kind of knowledge, and each tower with masked tokens
        ("native", 0, 3, CAT),
        ("native", 2, 0, {"knowledge": "triplets", **CAT}),
        ("average_pooled", 1, 2, {"knowledge": "template", **CAT}),
        ("attention_pooled", 1, 0, {"knowledge": "states", **CAT}),
        ("layer_scale", 0, 0, CAT),
    ],
    ids=label,
)
@torch.no_grad()
def test_variant_is_its_naive_reference(clip, block, visual, settings, images, knowledge):
    """The captions have 1, 3, 0 and 8 triplets. With average pooling this fails if a prompt is pooled."""
    model = make_aim(clip, trained=True, block=block, num_prompts=visual, **settings)
    features = model(images, Captions(model.prepare_knowledge(knowledge)), (IMAGE, CAPTION)).conditioned
    for row, (i, c) in enumerate(zip(IMAGE, CAPTION, strict=True)):
        assert_close(features[row], feature_under(model, images[i], [knowledge[c]]), atol=5e-5, rtol=1e-5)
    assert (features[0] - features[1]).abs().max() > 1e-3  # one image, two captions


@pytest.mark.parametrize("settings", VARIANTS, ids=label)
def test_variant_with_gradients_is_its_naive_reference(settings, images, knowledge):
    """With gradients, torch uses other attention kernels, and blocks are recomputed."""
    model = make_aim(trained=True, **settings).train()
    model.tower.recompute = True
    features = model.encode_image(images, knowledge)
    for i in range(4):
        assert_close(features[i], feature_under(model, images[i], [knowledge[i]]), atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", VARIANTS, ids=label)
@torch.no_grad()
def test_union_of_captions(settings, images, knowledge):
    """i2t `pooled`: captions 0 and 1 condition image 3; captions 3 and 2 condition image 0."""
    model = make_aim(trained=True, block=1, **settings)
    prompts = model(None, Captions(model.prepare_knowledge(knowledge))).captions.prompts
    united = EncodedCaptions(prompts.take(torch.tensor([0, 1, 3, 2])).unite(2), None)
    features = model(images[[3, 0]], united).conditioned
    for row, (image, members) in enumerate([(3, [0, 1]), (0, [3, 2])]):
        expected = feature_under(model, images[image], [knowledge[m] for m in members])
        assert_close(features[row], expected, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", VARIANTS, ids=label)
@torch.no_grad()
def test_order_and_padding_change_nothing(settings, images, knowledge):
    model = make_aim(trained=True, **settings)
    batch = model.prepare_knowledge(knowledge)
    expected = model(images, Captions(batch)).conditioned
    shuffled = batch.map(lambda x: x[:, torch.tensor([4, 2, 0, 5, 3, 1])])
    assert not torch.equal(shuffled.mask, batch.mask)  # gaps between triplets are allowed
    padded = batch.map(lambda x: torch.cat([x, x.new_ones(4, 5, *x.shape[2:])], dim=1))
    padded.mask[:, 6:] = False
    for changed in (shuffled, padded):
        assert_close(model(images, Captions(changed)).conditioned, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("conditioning", "settings"),
    [
        ("paired", {}),
        ("contrastive", {"block": 2, **LITERAL}),
        ("contrastive", {"knowledge": "triplets"}),
        ("paired", {"knowledge": "triplets", "num_prompts": 0}),
        ("paired", {"knowledge": "states", **LITERAL}),
        ("paired", {"knowledge": "template", **CAT}),
        ("contrastive", CAT),
        ("contrastive", {"num_prompts": 0, **CAT}),
    ],
    ids=label,
)
def test_whatever_a_stage_trains_has_a_gradient(settings, conditioning, images, knowledge, tokenizer):
    """Distributed engines fail on unused parameters. One caption has no knowledge, so null tokens get gradients too."""
    model = make_aim(trained=True, **settings).train()
    text = model.encode_text(tokenizer(["a dog jumps", "a small girl", "nothing", "men chase horses"]))
    batch = Batch(images, None, text, model.prepare_knowledge(knowledge), torch.arange(4))
    named = dict(model.named_parameters())
    for stage in (1, 2):
        model.zero_grad()
        set_trainable(model, stage)
        loss, _ = Objective(stage, model.interaction, conditioning, margin=2.0)(model, batch, 0)
        loss.backward()
        reached = {name: p.grad for name, p in named.items() if p.grad is not None}
        assert {name for name, grad in reached.items() if grad.abs().max() > 0} == trainable_names(model, stage)
        assert not {name for name in reached.keys() - trainable_names(model, stage) if named[name].numel()}
    new = {name for name, p in named.items() if not name.startswith("backbone.") and p.numel()}
    assert new == trainable_names(model, 1)


NEW = {"logit_scale", "visual_prompts", "triplet_encoder", "interaction"}
TRIPLETS, STATES = {"triplet_encoder"}, {"null_state", "state_projection"}
AIM = {"norm", "cross_triplet", "cross_state", "self_triplet", "self_state", "mlp", "gate"}


@pytest.mark.parametrize(
    ("settings", "lacks", "own", "aim_lacks"),
    [
        ({}, set(), {"aim", "adapter"} | STATES, set()),
        ({"knowledge": "triplets"}, set(), {"aim", "adapter"}, {"cross_state", "self_state"}),
        ({"knowledge": "states"}, TRIPLETS, {"aim", "adapter"} | STATES, {"cross_triplet", "self_triplet"}),
        ({"knowledge": "template"}, TRIPLETS, {"aim", "adapter"} | STATES, {"cross_triplet", "self_triplet"}),
        ({"interaction": "cat"}, set(), {"adapter"} | STATES, AIM),
        ({"interaction": "cat", "knowledge": "states"}, TRIPLETS, {"adapter"} | STATES, AIM),
        ({"knowledge": "none"}, {"interaction"} | TRIPLETS, set(), AIM),
    ],
)
def test_what_a_variant_does_not_read_does_not_exist(settings, lacks, own, aim_lacks):
    names = make_aim(**settings).adapter_state()
    assert {name.partition(".")[0] for name in names} == NEW - lacks
    inside = [name.split(".")[1:] for name in names if name.startswith("interaction.")]
    assert {name[0] for name in inside} == own
    assert {name[1] for name in inside if name[0] == "aim"} == AIM - aim_lacks


@pytest.mark.parametrize("knowledge_setting", SINGLE)
@torch.no_grad()
def test_gated_variants_start_as_the_base_model_and_cat_does_not(knowledge_setting, images, knowledge):
    base = make_clip().requires_grad_(False).encode_image(images)
    settings = {"knowledge": knowledge_setting, "num_prompts": 0}
    assert torch.equal(make_aim(**settings).encode_image(images, knowledge), base)
    concatenated = make_aim(interaction="cat", **settings)
    assert (concatenated.encode_image(images, knowledge) - base).abs().max() > 1e-4
    assert torch.equal(concatenated.encode_image(images), base)


# -- texts ------------------------------------------------------------------------------------------------------------


def test_template_is_the_papers_sentence(knowledge):
    """Table 2: "A photo capturing a [subject] performing [action] in relation to [object]."."""
    assert tower_texts(knowledge[1], 2, "template") == [
        "A photo capturing a girl performing studies in relation to laptop.",
        "A photo capturing a boy performing throws in relation to a big red ball.",
    ]
    assert tower_texts(knowledge[0], 6, "template") == ["A photo capturing a dog performing jumps in relation to ."]


@pytest.mark.parametrize("setting", ["both", "triplets", "template", "states", "none"])
@torch.no_grad()
def test_the_store_and_the_model_encode_the_same_texts(setting, knowledge, tmp_path):
    model = make_aim(knowledge=setting)
    captions = SplitCaptions(["a", "b", "c", "d"], knowledge, torch.arange(4), 4)
    texts = captions.all_texts(6, setting)
    reads = setting not in ("triplets", "none")
    assert texts[:4] == ["a", "b", "c", "d"]
    assert texts[4:] == ([text for item in knowledge for text in sentences(item, setting)] if reads else [])
    collate = knowledge_collator(model, str(tmp_path), "float32")
    encode_missing(collate.store, texts, model.backbone, model.tokenizer)
    collated, prepared = collate(knowledge), model.prepare_knowledge(knowledge)
    assert_close(collated.states, prepared.states, atol=1e-5, rtol=0)
    assert (prepared.states.abs().sum(-1) > 0).equal(prepared.mask & reads)
    for name in ("triplet_tokens", "token_mask", "mask"):
        assert torch.equal(getattr(collated, name), getattr(prepared, name))


@pytest.mark.usefixtures("fresh_accelerate")
def test_text_only_control_is_the_same_beside_any_model(clip_folder, shards, tmp_path):
    """It adds states to captions even if the evaluated model reads none."""
    rows = []
    for setting in ("both", "triplets"):
        config = PromptConfig(knowledge=setting)
        save_adapter(tmp_path / setting, amp.create_model_and_transforms(clip_folder, prompt_config=config)[0])
        settings = EvaluationSettings(
            str(shards),
            adapters=[f"{setting}={tmp_path / setting}"],
            search=RetrievalSettings(top_k=4),
            text_only=True,
            workers=0,
            cache=str(tmp_path / f"{setting} cache"),
            mixed_precision="no",
            out=tmp_path / f"{setting}.json",
        )
        result = evaluate(settings).result
        named = {row.name: (row.i2t.recall, row.t2i.recall) for row in result.rows}
        rows.append(named["captions with states"])
        assert rows[-1] == rows[0] != named["base CLIP"]


# -- adapters and refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", VARIANTS, ids=label)
def test_adapter_comes_back_as_the_same_variant(settings, clip_folder, images, knowledge, tmp_path):
    config = PromptConfig(**aim_settings(**settings))
    model, *_ = amp.create_model_and_transforms(clip_folder, prompt_config=config)
    save_adapter(tmp_path / "adapter.safetensors", model)
    back, *_ = amp.create_model_and_transforms(clip_folder, adapter=str(tmp_path / "adapter.safetensors"))
    assert back.config == config
    with torch.no_grad():
        assert torch.equal(back.encode_image(images, knowledge), model.encode_image(images, knowledge))


def test_blocks_that_cannot_leave_padding_out_are_refused():
    import open_clip

    config = clip_config()
    vision = open_clip.CLIPVisionCfg(**config["vision_cfg"], qk_norm=True)
    clip = open_clip.CLIP(config["embed_dim"], vision, open_clip.CLIPTextCfg(**config["text_cfg"]))
    with pytest.raises(AmpError, match=r"interaction is 'cat' and the image tower's blocks are not .* choose"):
        ActionAwareCLIP(clip, PromptConfig(interaction="cat"))
    ActionAwareCLIP(clip, PromptConfig())
