"""CLIPs with timm image towers and Hugging Face text towers, compared with open_clip at step 0 and with naive loops."""

import json
import math
from pathlib import Path

import open_clip
import pytest
import torch
from support.commands import arguments, evaluation_settings
from support.equations.image_features import TimmTower, early_tokens, image_feature, late_tokens, prompts_of
from support.models import EMBED_DIM, VISION, aim_settings
from support.repository import launcher
from support.timm_towers import TOWERS, make_timm_clip, make_timm_model, tower_config, write_folder, write_text_tower
from torch.testing import assert_close

import amp
from amp.data.stream import Batch
from amp.knowledge.tensors import Captions, TripletTokenizer
from amp.model.adapter import load_adapter, save_adapter
from amp.model.clip import ActionAwareCLIP
from amp.model.factory import to_precision
from amp.model.towers import make_backbone
from amp.plan.simulator import shapes_only
from amp.report.attention import attention_maps
from amp.train.config import ModelSettings, TrainConfig
from amp.train.objective import Objective
from amp.train.stages import set_trainable, trainable_names

CAPTIONS = ["A dog jumps", "A small girl studies", "A street", "Men chase horses"]
ALL = torch.arange(4)


def every(*names):
    return pytest.mark.parametrize("tower", names or tuple(TOWERS))


# -- the tower alone --------------------------------------------------------------------------------------------------


@every()
@torch.no_grad()
def test_the_pieces_make_encode_image_bit_for_bit(tower, images):
    clip = make_timm_clip(tower)
    expected, backbone = clip.encode_image(images), make_backbone(clip.train())
    assert (expected[0] - expected[1]).abs().max() > 0.1  # otherwise all towers would look equal
    first = TOWERS[tower][-1]
    assert (backbone.num_prefix, backbone.num_patches, backbone.num_tokens) == (first, 16, first + 16)
    assert (backbone.vision_width, backbone.vision_heads, backbone.num_layers) == (32, 2, 3)
    assert (backbone.patch_size, backbone.grid_size, backbone.text_width) == ((8, 8), (4, 4), 40)
    assert backbone.embed_dim == expected.shape[1] and not backbone.quick_gelu
    for cut in range(4):
        tokens = backbone.blocks(backbone.embed(images), 0, cut)
        assert tokens.shape == (4, first + 16, 32)
        assert torch.equal(backbone.pool(backbone.blocks(tokens, cut, 3)), expected)
    pooled, patches = backbone.pooled(tokens)
    assert pooled.shape == (4, backbone.pooled_width) and patches.shape == (4, 16, 32)
    assert not any(module.training for module in backbone.train().modules())


# Each kind of block, with no, a shared and a per-block rotary embedding.
@every("vit_token", "vit_post_norm", "eva02", "eva01", "perception", "eva_mixed")
@torch.no_grad()
def test_prompts_behind_the_patches_are_not_turned_and_patches_are(tower):
    """One block on tokens with five prompts after the patches, two of which are masked."""
    backbone = make_backbone(make_timm_clip(tower))
    naive, tokens = TimmTower(backbone.visual), torch.randn(2, backbone.num_tokens + 5, 32)
    absent = torch.zeros(2, tokens.shape[1], dtype=torch.bool)
    absent[1, -2:] = True
    for index in range(3):
        whole = backbone.prompted_block(index, tokens)
        assert torch.equal(whole, backbone.blocks(tokens, index, index + 1))
        assert_close(whole[0], naive.run(index, tokens[0]), atol=2e-5, rtol=0)
        masked = backbone.prompted_block(index, tokens, absent=absent)
        assert_close(masked[0], whole[0], atol=2e-5, rtol=0)
        assert_close(masked[1, :-2], naive.run(index, tokens[1, :-2]), atol=2e-5, rtol=0)
        assert (masked[1, :-2] - whole[1, :-2]).abs().max() > 1e-3


@every("siglip", "vit_registers", "eva02")
@torch.no_grad()
def test_pooling_never_sees_tokens_behind_the_patches(tower):
    backbone = make_backbone(make_timm_clip(tower))
    tokens = torch.randn(4, backbone.num_tokens, 32)
    extended = torch.cat([tokens, 1e4 * torch.randn(4, 5, 32)], dim=1)
    assert torch.equal(backbone.pool(extended), backbone.pool(tokens))


@every("siglip", "eva02")
def test_recomputing_changes_neither_values_nor_gradients(tower, monkeypatch):
    backbone, found, calls = make_backbone(make_timm_clip(tower)), [], []
    mlp = backbone.visual.trunk.blocks[1].mlp
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda x: calls.append(1) or forward(x))
    for recompute in (False, True):
        given = torch.randn(2, backbone.num_tokens + 4, 32, generator=torch.Generator().manual_seed(0))
        tokens = given.requires_grad_()
        backbone.prompted_block(1, tokens, recompute).square().sum().backward()
        found.append(tokens.grad)
    assert torch.equal(*found) and len(calls) == 3  # once without gradients, then in the forward and backward pass


# -- refusals ---------------------------------------------------------------------------------------------------------


def timm_clip(name, **vision):
    """A CLIP with any tower of timm, on the meta device."""
    with torch.device("meta"):
        return open_clip.CustomTextCLIP(
            24,
            {"timm_model_name": name, "image_size": 224, **vision},
            {"width": 40, "heads": 4, "layers": 1, "vocab_size": 10},
        )


@pytest.mark.parametrize(
    ("name", "vision", "seen"),
    [
        ("convnext_atto", {}, "timm's ConvNeXt"),
        ("swin_tiny_patch4_window7_224", {}, "timm's SwinTransformer"),
        ("resnet10t", {}, "timm's ResNet"),
        ("naflexvit_base_patch16_gap", {}, "timm's NaFlexVit"),
        ("deit_tiny_distilled_patch16_224", {"timm_pool": ""}, "timm's VisionTransformerDistilled"),
        ("vit_tiny_r_s16_p8_224", {}, "timm's VisionTransformer with patches from HybridEmbed"),
        ("amp_tiny_parallel", {"timm_pool": "token"}, "timm's VisionTransformer with blocks of ParallelScalingBlock"),
        ("amp_tiny_vit_token", {"timm_pool": "", "timm_proj": None}, "without pooling"),
    ],
)
def test_other_towers_are_refused_by_name(name, vision, seen):
    with pytest.raises(amp.AmpError, match=rf"image tower is .*{seen}.*, expected open_clip's native.*ViT-B-16-SigLIP"):
        make_backbone(timm_clip(name, **vision))


# -- the model at step 0 ----------------------------------------------------------------------------------------------


def encoded(model, images, knowledge):
    """Action-aware features of images, each with the knowledge of one caption, for any interaction."""
    return model.encode_image(images, knowledge, text=model.encode_text(model.tokenizer(CAPTIONS)))


@pytest.mark.parametrize(
    ("tower", "settings"),
    [
        ("siglip", aim_settings(0)),
        ("vit_token", {"depth": 1 / 3}),
        ("vit_registers", aim_settings(2)),
        ("vit_registers", {"depth": 1 / 3}),
        ("vit_post_norm", aim_settings(0)),
        ("vit_post_norm", {"depth": 1 / 3}),
        ("eva02", aim_settings(2)),
        ("eva_average", {"depth": 1 / 3}),
        ("eva01", aim_settings(0)),
        ("perception", {"depth": 1 / 3}),
        ("eva_mixed", aim_settings(2)),
    ],
    ids=lambda x: x if isinstance(x, str) else x.get("interaction", "readout"),
)
@torch.no_grad()
def test_action_aware_features_start_as_the_base_models(tower, settings, images, knowledge):
    """Bit for bit, or with gradients except for rounding. `cat` has no gate, as in native towers.

    Towers without prefix tokens differ by rounding: open_clip averages the convolution's output with channels first,
    but AIM's patches have another memory layout, so sums have another order.
    """
    settings = {**settings, "num_prompts": 0}
    clip, model = make_timm_clip(tower), make_timm_model(tower, **settings).train()
    want = clip.encode_image(images)
    assert torch.equal(model.encode_image(images), want)
    apart = 2e-6 if "interaction" in settings and tower == "vit_post_norm" else 0.0
    assert_close(encoded(model, images, knowledge), want, atol=apart, rtol=0)
    with torch.enable_grad():
        features = encoded(model, images, knowledge)
        assert features.requires_grad
        assert_close(features.detach(), want, atol=1e-5, rtol=0)
    shaken = make_timm_model(tower, trained=True, **settings)
    assert (encoded(shaken, images, knowledge) - want).abs().max() > 1e-3


@every("siglip", "eva02")
@torch.no_grad()
def test_visual_prompts_are_all_that_differs_at_step_0(tower, images, knowledge):
    for settings in (aim_settings(), {}):
        model = make_timm_model(tower, **settings)
        captions = Captions(model.prepare_knowledge(knowledge), model.encode_text(model.tokenizer(CAPTIONS)))
        features = model(images, captions, plain=ALL)
        assert torch.equal(features.conditioned, features.plain)
        assert (features.plain - model.encode_image(images)).abs().max() > 1e-4


# -- the model when trained -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tower", "interaction"),
    [
        ("siglip", "aim"),
        ("siglip", "cat"),
        ("vit_token", "cat"),
        ("vit_registers", "aim"),
        ("vit_post_norm", "aim"),
        ("eva02", "cat"),
        ("eva_average", "aim"),
        ("eva01", "cat"),
        ("perception", "aim"),
        ("eva_mixed", "cat"),
    ],
)
@torch.no_grad()
def test_the_whole_model_is_a_naive_loop(tower, interaction, images, knowledge):
    """Without knowledge, with one triplet, and with padding, which the naive loop doesn't have."""
    model = make_timm_model(tower, trained=True, **aim_settings(1, interaction=interaction, num_prompts=3))
    batch = model.prepare_knowledge(knowledge)
    features = model(images, Captions(batch), plain=ALL)
    for i in (1, 2):
        assert_close(
            features.conditioned[i], image_feature(model, images[i], prompts_of(model, batch, i)), atol=5e-5, rtol=1e-4
        )
    assert_close(features.plain[0], image_feature(model, images[0]), atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize(("tower", "blocks"), [("siglip", 0), ("eva_average", 0), ("perception", 1)])
@torch.no_grad()
def test_the_readout_asks_the_patches_alone(tower, blocks, images, knowledge):
    """It attends to the last block's patches after the final norms, without class token and registers."""
    options = {"blocks": blocks}
    model = make_timm_model(tower, trained=True, depth=1 / 3, interaction_options=options, enrich=False)
    readout = model.interaction.readout
    naive, first = TimmTower(model.backbone.visual), TOWERS[tower][-1]
    text = model.encode_text(model.tokenizer(CAPTIONS))
    batch = model.prepare_knowledge(knowledge)
    captions = Captions(batch, text)
    (queries,) = model(None, captions).captions.prompts.parts
    for i in (1, 3):
        tokens = early_tokens(naive, images[i], 1)
        seen = readout.blocks(tokens[None, first:])[0] if blocks else None
        tokens = late_tokens(model, naive, tokens)
        seen = naive.trunk.fc_norm(naive.trunk.norm(tokens))[first:] if seen is None else seen
        key, value = readout.key(seen), readout.value(seen)
        asked = queries[i][: 1 + int(batch.mask[i].sum())]
        answers = (asked @ key.T / math.sqrt(len(key.T))).softmax(dim=1) @ value  # one head, because d is below 64
        want = naive.pool(tokens) + readout.out(answers.mean(dim=0))
        got = model(images, captions).conditioned[i]
        assert readout.heads == 1
        assert_close(got, want, atol=5e-5, rtol=1e-4)
    together = model(images, captions, "all").conditioned
    assert_close(together.diagonal().T, model(images, captions).conditioned, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("tower", "interaction"),
    [("siglip", "aim"), ("vit_registers", "readout"), ("eva02", "cat"), ("perception", "aim")],
)
def test_a_training_step_moves_all_that_is_new_and_nothing_else(tower, interaction, images, knowledge):
    options = {} if interaction == "readout" else {"bottleneck": 4}
    settings = {"interaction": interaction, "interaction_options": options, "depth": 1 / 3, "num_prompts": 2}
    model = make_timm_model(tower, **settings).train()
    set_trainable(model, 1)
    before = {name: x.clone() for name, x in model.backbone.state_dict().items()}
    text = model.encode_text(model.tokenizer(CAPTIONS)).detach()
    batch = Batch(images, None, text, model.prepare_knowledge(knowledge), torch.arange(4))
    names, moved, losses = trainable_names(model, 1), set(), []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.tower.recompute = True
    for step in range(2):  # with a zero gate, gradients are zero in the first step
        loss = Objective(1, model.interaction)(model, batch, step)[0]
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        moved |= {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()
    assert all(math.isfinite(loss) for loss in losses)
    still = names - moved
    # A constant added to all keys doesn't change the softmax, and captions without knowledge have no queries.
    assert still <= {"interaction.readout.key.bias", "triplet_encoder.null"} if interaction == "readout" else not still
    assert moved <= names
    assert not [name for name, p in model.backbone.named_parameters() if p.requires_grad or p.grad is not None]
    assert all(torch.equal(x, before[name]) for name, x in model.backbone.state_dict().items())


@pytest.mark.parametrize(("tower", "name"), [("siglip", "bf16"), ("eva02", "fp16"), ("eva_mixed", "bf16")])
@torch.no_grad()
def test_a_backbone_in_low_precision_starts_as_itself(tower, name, images, knowledge):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[name]
    clip, model = make_timm_clip(tower), make_timm_model(tower, **aim_settings(1, num_prompts=0))
    exact = clip.encode_image(images)
    for m in (clip, model.backbone.clip):
        to_precision(m, name)
    features = encoded(model, images, knowledge)
    assert features.dtype == dtype and model.backbone.dtype == dtype
    assert torch.equal(features, clip.encode_image(images.to(dtype)))
    assert_close(features.float(), exact, atol=0.1, rtol=0.1)
    prompted = make_timm_model(tower, interaction="cat")
    to_precision(prompted.backbone.clip, name)
    assert encoded(prompted, images, knowledge).isfinite().all()


@every("siglip", "vit_registers")
@torch.no_grad()
def test_attention_maps_are_those_of_the_patches(tower, images, knowledge):
    for interaction in ("aim", "readout"):
        model = make_timm_model(tower, trained=True, interaction=interaction)
        found = attention_maps(model, model.tower.early(images[1:2]), model.prepare_knowledge(knowledge[1:2]))
        assert set(found) == {"triplet", "state"}
        for maps in found.values():
            assert maps.shape == (3, 4, 4)
            assert_close(maps.sum(dim=(1, 2)), torch.ones(3))


# -- files and shapes -------------------------------------------------------------------------------------------------


def test_adapters_know_their_tower(tmp_path, images, knowledge):
    config = amp.PromptConfig(**aim_settings(num_prompts=2))
    name, other = (write_folder(tmp_path / f"seed{i}", tower_config("eva02"), seed=i) for i in (0, 1))
    model, _, _ = amp.create_model_and_transforms(name, prompt_config=config)
    for key, value in model.adapter_state().items():
        value.data += 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(len(key)))
    save_adapter(tmp_path / "a.safetensors", model)
    again, _, _ = amp.create_model_and_transforms(name, adapter=str(tmp_path / "a.safetensors"))
    with torch.no_grad():
        assert torch.equal(again.encode_image(images, knowledge), model.encode_image(images, knowledge))
    with pytest.raises(amp.AmpError, match="was trained on base model"):
        amp.create_model_and_transforms(other, adapter=str(tmp_path / "a.safetensors"))
    foreign = amp.create_model_and_transforms(other, prompt_config=config)[0]
    with pytest.raises(amp.AmpError, match="was trained on base model"):
        load_adapter(tmp_path / "a.safetensors", foreign)


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP", "PE-Core-T-16-384"])
def test_shapes_of_real_models_without_their_weights(name):
    """open_clip's configurations on the meta device, as in a plan, with 16-bit weights."""
    prefix, width, d_t, d = {
        "ViT-B-16-SigLIP": (0, 768, 768, 768),
        "PE-Core-T-16-384": (1, 192, 512, 512),
    }[name]
    config = TrainConfig(out="runs/x", model=ModelSettings(name, None, precision="bf16"))
    model = shapes_only(config)
    backbone = model.backbone
    assert (backbone.num_prefix, backbone.vision_width, backbone.text_width, backbone.embed_dim) == (
        prefix,
        width,
        d_t,
        d,
    )
    assert {p.device.type for p in model.parameters()} == {"meta"} and backbone.dtype == torch.bfloat16
    side = backbone.visual.image_size
    with torch.device("meta"):
        early = model.tower.early(torch.empty(2, 3, *side))
        assert early.shape == (2, prefix + backbone.num_patches, width)
        assert model.interaction.image_features(model.tower, early).shape == (2, d)


# -- Hugging Face text towers -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text_folders(tmp_path_factory):
    """`text_folders(kind)` returns the name of a model with this text tower and a timm image tower."""
    made = {}

    def named(kind, tower="siglip"):
        if (kind, tower) not in made:
            folder = tmp_path_factory.mktemp("hf") / kind
            made[kind, tower] = write_folder(folder, tower_config(tower, write_text_tower(folder, kind)))
        return made[kind, tower]

    return named


@pytest.mark.parametrize("kind", ["xlm-roberta", "bert", "mt5"])
@torch.no_grad()
def test_hugging_face_text_towers(kind, text_folders, images, knowledge):
    name = text_folders(kind)
    clip = open_clip.create_model(name).eval().requires_grad_(False)
    config = amp.PromptConfig(**aim_settings(num_prompts=0))
    model, _, _ = amp.create_model_and_transforms(name, prompt_config=config)
    ids = model.tokenizer(CAPTIONS)
    assert ids.shape == (4, 96) and (ids[:, -1] == 1).all()  # padding is token 1
    assert torch.equal(model.encode_text(ids), clip.encode_text(ids))
    assert torch.equal(model.backbone.encode_text(ids), clip.encode_text(ids))
    text = clip.text.transformer
    table = text.embed_tokens.weight if kind == "mt5" else text.embeddings.word_embeddings.weight
    words = torch.tensor([[0, 5], [7, 1]])
    assert model.backbone.text_width == 40 and torch.equal(model.backbone.embed_tokens(words), table[words])
    assert torch.equal(model.encode_image(images, knowledge), clip.encode_image(images))
    state = clip.encode_text(model.tokenizer([amp.knowledge.text.state_texts(knowledge[0], 1)[0]]))[0]
    assert_close(model.prepare_knowledge(knowledge).states[0, 0], state, atol=1e-5, rtol=1e-5)
    low, _, _ = amp.create_model_and_transforms(name, prompt_config=config, precision="bf16")
    assert_close(low.encode_text(ids).float(), clip.encode_text(ids), atol=0.1, rtol=0.1)


def test_a_hugging_face_text_tower_behind_a_native_image_tower(text_folders, images, knowledge):
    folder = text_folders("bert").removeprefix("local-dir:")
    config = json.loads(Path(folder, "open_clip_config.json").read_text())["model_cfg"]
    clip = open_clip.CustomTextCLIP(
        EMBED_DIM, open_clip.CLIPVisionCfg(**VISION), {**config["text_cfg"], "hf_model_pretrained": False}
    ).eval()
    model = ActionAwareCLIP(
        clip, amp.PromptConfig(**aim_settings(num_prompts=0)), open_clip.get_tokenizer(f"local-dir:{folder}")
    )
    with torch.no_grad():
        assert torch.equal(model.encode_image(images, knowledge), clip.encode_image(images))


def test_slots_of_sentencepiece(text_folders):
    """Without start and end tokens, without single word-boundary tokens, and cleaned like captions."""
    tokenizer = open_clip.get_tokenizer(text_folders("xlm-roberta"))
    vocabulary = tokenizer.tokenizer.convert_tokens_to_ids
    slots = TripletTokenizer(tokenizer, 1)

    def ids(text):
        found, count = slots.slot(text)
        assert not found[count:].any()
        return found[:count].tolist()

    assert ids("red   dog") == vocabulary(["▁red", "▁dog"])
    assert tokenizer.tokenizer.encode("cat", add_special_tokens=False)[0] == vocabulary("▁")
    assert ids("cat") == vocabulary(["c", "a", "t"])
    assert ids("") == ids("  ") == []
    assert ids("犬") == [vocabulary("<unk>")]
    tokenizer.clean_fn = open_clip.tokenizer.get_clean_fn("canonicalize")  # like SigLIP's
    assert TripletTokenizer(tokenizer, 1).slot("Red, DOG!")[0].tolist()[:2] == vocabulary(["▁red", "▁dog"])
    assert TripletTokenizer(tokenizer, 1).slot("...")[1] == 0


def test_an_unknown_text_configuration_is_one_clear_error(text_folders, monkeypatch):
    """The configuration of the text tower may be stored elsewhere, such as on the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the client retries for a minute
    folder = text_folders("bert", "eva02").removeprefix("local-dir:")
    path = Path(folder, "open_clip_config.json")
    config = json.loads(path.read_text())
    broken = {**config["model_cfg"], "text_cfg": {**config["model_cfg"]["text_cfg"], "hf_model_name": "no/such-model"}}
    path.write_text(json.dumps({**config, "model_cfg": broken}))
    with pytest.raises(amp.AmpError, match=r"local-dir.*can't build it without its weights.*network"):
        shapes_only(TrainConfig(out="runs/x", model=ModelSettings(f"local-dir:{folder}", None)))
    with pytest.raises(amp.AmpError, match=r"can't load it"):
        amp.create_model_and_transforms(f"local-dir:{folder}")


def test_both_towers_from_elsewhere_are_trained_and_evaluated(text_folders, shards, tmp_path, fresh_accelerate):
    """The complete workflow with the launchers: cached early tokens and texts, AIM, adapters that are loaded again."""
    name = text_folders("xlm-roberta", "perception")
    common = {
        "model.name": name,
        "model.pretrained": "null",
        "data.shards": shards,
        "data.cache": tmp_path / "cache",
        "data.batch_size": 4,
        "data.workers": 0,
        "data.augment": "none",
        "prompt.interaction": "aim",
        "prompt.depth": 0.34,
        "prompt.num_prompts": 2,
        "prompt.enrich": "false",
    }
    train = {
        **common,
        "data.cache_images": "true",
        "data.val_split": "null",
        "stages": "[1, 2]",
        "trackers": "[]",
        "stage1.max_steps": 2,
        "stage2.max_steps": 2,
        "out": tmp_path / "run",
    }
    launcher("launchers/train.py").main(arguments(train))
    adapter = tmp_path / "run" / "stage2" / "adapter.safetensors"
    evaluate = {**common, "out": tmp_path / "out.json", "adapters": f"mine={adapter}", "bootstrap": 20}
    launcher("amp/commands/evaluate.py").main(arguments(evaluation_settings(evaluate)))
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["rows"][0]["name"] == "base CLIP" and len(found["rows"]) > 1
    model, _, _ = amp.create_model_and_transforms(name, adapter=str(adapter))
    assert {n.partition(".")[0] for n in model.adapter_state()} == {
        "logit_scale",
        "visual_prompts",
        "triplet_encoder",
        "interaction",
    }
