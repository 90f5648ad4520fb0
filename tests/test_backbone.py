"""The wrapped open_clip model: equal outputs when run in parts, unsupported towers, and the hash of the base model."""

import copy
import random

import open_clip
import pytest
import torch
from support.models import CLIP_VARIANTS, EMBED_DIM, TEXT, VISION, make_clip
from torch import nn
from torch.testing import assert_close

from amp.errors import AmpError
from amp.model.towers import make_backbone
from amp.model.towers.residual_block import residual_block

VARIANTS = sorted(CLIP_VARIANTS)
TEXTS = [
    "",
    "a dog",
    "A man in a red shirt climbs a rock wall, while two others watch from below.",
    "word " * 500,  # far over the 77 tokens: cut by the tokenizer
    "Fine-grained state description of action triplet <girl, studies, laptop> is She focuses on the laptop screen, "
    "types on the keyboard, and maintains a stable posture",
    "¿Qué? 犬が走る 🐕",
]


# -- properties -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["native", "custom_text", "quickgelu", "open_clip_4", "attention_pooled"])
def test_sizes_come_from_the_towers(variant):
    backbone = make_backbone(make_clip(variant))
    assert (backbone.vision_width, backbone.text_width, backbone.embed_dim) == (
        VISION["width"],
        TEXT["width"],
        EMBED_DIM,
    )
    assert (backbone.vision_heads, backbone.num_layers, backbone.num_patches) == (2, 3, 16)
    assert (backbone.patch_size, backbone.context_length) == ((8, 8), 77)
    assert backbone.quick_gelu == (variant == "quickgelu")
    assert backbone.causal_text and backbone.dtype == torch.float32


def test_clip_is_frozen_and_stays_in_eval_mode():
    backbone = make_backbone(make_clip().train())
    for mode in (True, False):
        backbone.train(mode)
        assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_every_parameter_has_a_dimension_and_its_value():
    """DeepSpeed can't broadcast zero-dimensional parameters, such as CLIP's temperature."""
    clip = make_clip()
    clip.logit_scale.data.fill_(3.25)
    assert clip.logit_scale.ndim == 0
    backbone = make_backbone(clip)
    assert all(parameter.ndim > 0 for parameter in backbone.parameters())
    assert clip.logit_scale.tolist() == [3.25] and not clip.logit_scale.requires_grad


# -- unsupported towers -----------------------------------------------------------------------------------------------


def on_meta(name):
    with torch.device("meta"):
        return open_clip.create_model(name, device="meta", pretrained_image=False)


def test_foreign_image_towers_are_refused():
    """Image towers of timm are tested in test_timm_backbone.py."""
    with pytest.raises(
        AmpError, match=r"image tower is ModifiedResNet, expected open_clip's native VisionTransformer.*ViT-B-16"
    ):
        make_backbone(on_meta("RN50"))


def test_text_tower_without_token_embedding_is_refused():
    clip = make_clip("custom_text")
    clip.text = nn.Linear(2, 2)
    with pytest.raises(AmpError, match=r"text tower is Linear.*native TextTransformer.*hf_model_name"):
        make_backbone(clip)


def test_text_towers_of_other_architectures_are_refused():
    """open_clip 4 has a text tower with another tokenizer than CLIP's (`text_arch: modern`)."""
    clip = make_clip("custom_text")
    clip.text = type("ModernTextTransformer", (nn.Module,), {})()
    clip.text.token_embedding = nn.Embedding(2, 2)
    with pytest.raises(AmpError, match=r"text tower is ModernTextTransformer.*no text_arch, or hf_model_name"):
        make_backbone(clip)


def test_sequence_first_towers_are_refused():
    """Such towers exist in open_clip 3."""
    clip = make_clip()
    clip.visual.transformer.batch_first = False
    with pytest.raises(AmpError, match="batch_first=False, expected True"):
        make_backbone(clip)


def test_something_else_is_refused():
    with pytest.raises(AmpError, match="image tower is missing in Linear"):
        make_backbone(nn.Linear(2, 2))


# -- image tower ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_the_pieces_make_encode_image_bit_for_bit(variant, images):
    clip = make_clip(variant)
    expected, backbone = clip.encode_image(images), make_backbone(clip)
    for cut in range(4):
        tokens = backbone.blocks(backbone.embed(images), 0, cut)
        assert tokens.shape == (4, 17, 32)
        assert torch.equal(backbone.pool(backbone.blocks(tokens, cut, 3)), expected)


@pytest.mark.parametrize(
    ("variant", "extra"),
    [
        ("native", 5),
        ("average_pooled", 0),
        ("attention_pooled", 5),
        ("quickgelu", 0),
        ("open_clip_4", 5),
        ("layer_scale", 5),
    ],
)
@torch.no_grad()
def test_last_block_for_the_class_token_equals_the_whole_block(variant, extra):
    backbone, tokens = make_backbone(make_clip(variant)), torch.randn(4, 17 + extra, 32)
    whole, short = backbone.blocks(tokens, 2, 3), backbone.prompted_block(2, tokens)
    only_class = variant not in ("average_pooled", "attention_pooled")
    assert short.shape == (4, 1 if only_class else 17 + extra, 32)
    assert_close(short, whole[:, : short.shape[1]], atol=1e-5, rtol=1e-5)
    assert_close(backbone.pool(short), backbone.pool(whole), atol=1e-5, rtol=1e-5)
    first = residual_block(backbone.visual.transformer.resblocks[2], tokens, queries=slice(1))
    assert_close(first, whole[:, :1], atol=1e-5, rtol=1e-5)
    for index in (0, 1):
        assert torch.equal(backbone.prompted_block(index, tokens), backbone.blocks(tokens, index, index + 1))


def test_blocks_are_those_of_the_base_model_in_training():
    """Also their gradients, with prompts behind the patches."""
    clip = make_clip("layer_scale")
    backbone, tokens = make_backbone(clip), torch.randn(4, 17 + 3, 32, requires_grad=True)
    found, expected = backbone.blocks(tokens, 0, 2), tokens
    for block in clip.visual.transformer.resblocks[:2]:
        expected = block(expected)
    assert_close(found, expected, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(x.square().sum(), tokens)[0] for x in (found, expected)]
    assert_close(*gradients, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_custom_blocks_run_whole():
    """open_clip's CustomResidualAttentionBlock has other submodules, so the shortened last block can't be used."""
    config = {**VISION, "qk_norm": True, "scale_fc": True}
    clip = open_clip.CLIP(EMBED_DIM, open_clip.CLIPVisionCfg(**config), open_clip.CLIPTextCfg(**TEXT)).eval()
    backbone, tokens = make_backbone(clip), torch.randn(2, 17, 32)
    assert torch.equal(backbone.prompted_block(2, tokens), backbone.blocks(tokens, 2, 3))


@pytest.mark.parametrize("variant", ["native", "average_pooled", "attention_pooled"])
@torch.no_grad()
def test_pooling_never_sees_tokens_behind_the_patches(variant):
    backbone, tokens = make_backbone(make_clip(variant)), torch.randn(4, 17, 32)
    extended = torch.cat([tokens, 1e4 * torch.randn(4, 5, 32)], dim=1)
    assert torch.equal(backbone.pool(extended), backbone.pool(tokens))


@pytest.mark.parametrize("index", [1, 2])
def test_recomputing_changes_neither_values_nor_gradients(index, monkeypatch):
    backbone, found = make_backbone(make_clip()), []
    block = backbone.visual.transformer.resblocks[index]
    calls, mlp_forward = [], block.mlp.forward
    monkeypatch.setattr(block.mlp, "forward", lambda x: calls.append(1) or mlp_forward(x))
    for recompute in (False, True):
        tokens = torch.randn(2, 21, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        backbone.prompted_block(index, tokens, recompute).square().sum().backward()
        found.append(tokens.grad)
    assert torch.equal(*found)
    assert len(calls) == 3  # once without gradients, once in the forward and once in the backward pass


# -- text tower -------------------------------------------------------------------------------------------------------


def text_tower(text=None, **own):
    """A tiny CLIP with other settings of its text tower."""
    text_config = open_clip.CLIPTextCfg(**TEXT, **(text or {}))
    clip = open_clip.CLIP(EMBED_DIM, open_clip.CLIPVisionCfg(**VISION), text_config, **own)
    return clip.eval()


@pytest.mark.parametrize("chosen", [slice(0, 1), slice(0, 2), slice(0, 3), slice(0, 6)], ids=["empty", "2", "3", "all"])
@torch.no_grad()
def test_text_tree_equals_full_text(chosen, tokenizer):
    """The order of sums changes their rounding: features differ by up to 1e-13 in fp64 and 4e-6 in fp32.

    Feature values are between 1 and 4, so 4e-6 is about ten units in the last place.
    """
    ids = tokenizer(TEXTS[chosen])
    ends = (ids.argmax(dim=1) + 1).tolist()
    assert max(ends) == {1: 2, 2: 4, 3: 20, 6: 77}[len(ids)]
    prefixes = {tuple(row[:stop]) for row, end in zip(ids.tolist(), ends, strict=True) for stop in range(1, end + 1)}
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 4e-6)):
        clip = make_clip().to(dtype)
        expected, computed = clip.encode_text(ids), []
        assert 0.1 < expected.abs().max() < 10
        first = clip.transformer.resblocks[0].ln_1
        first.register_forward_hook(lambda _, args, out, seen=computed: seen.append(args[0].shape[:2].numel()))
        assert_close(make_backbone(clip).encode_text(ids), expected, atol=tolerance, rtol=0)
        assert computed == [len(prefixes)]
        assert_close(make_backbone(clip).encode_cut_text(ids[:, : max(ends)]), expected, atol=tolerance, rtol=0)


@torch.no_grad()
def test_many_texts_are_split_into_small_trees(tokenizer):
    """Repeated texts and texts in any order get their own features; a tree has at most 256 tokens."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(["dog", "man", "red", "ball"], k=number % 20)) for number in range(90)] * 2
    clip, computed = make_clip(), []
    clip.transformer.resblocks[0].ln_1.register_forward_hook(lambda _, args, out: computed.append(args[0].shape[1]))
    found = make_backbone(clip).encode_text(tokenizer(texts))
    assert len(computed) > 1 and max(computed) <= 256 and sum(computed[:-1]) > 128 * (len(computed) - 1)
    expected = torch.cat([clip.encode_text(tokenizer([text])) for text in texts])
    assert_close(found, expected, atol=4e-6, rtol=0)


@torch.no_grad()
def test_a_known_beginning_is_computed_once(tokenizer):
    """Texts with and without it keep their features; new weights and an earlier call under autocast leave no trace."""
    beginning, other = tokenizer(["a state of <", "a dog"])
    texts = ["a state of <dog, runs> is fast", "a state of <dog, lies> is calm", "a dog runs", "a state of"]
    ids, clip, computed = tokenizer(texts), make_clip(), []
    clip.transformer.resblocks[0].mlp.register_forward_hook(lambda _, args, out: computed.append(args[0].shape[1]))
    backbone = make_backbone(clip)
    with torch.autocast("cpu", torch.bfloat16):
        backbone.encode_text(ids, beginning)
    rows = [row[: row.index(49407) + 1] for row in ids.tolist()]
    nodes = len({tuple(row[:stop]) for row in rows for stop in range(1, len(row) + 1)})
    expected = clip.encode_text(ids)
    for given, first in ((beginning, 0), (beginning, 0), (other, 3), (beginning, 5)):
        computed.clear()
        assert_close(backbone.encode_text(ids, given), expected, atol=4e-6, rtol=0)
        assert computed == [first] * (first > 0) + [nodes - int(given.argmax())]
    for change in (backbone.double, lambda: backbone.load_state_dict(make_backbone(make_clip(seed=1)).state_dict())):
        change()
        assert_close(backbone.encode_text(ids, beginning), clip.encode_text(ids), atol=1e-13, rtol=0)


@pytest.mark.parametrize("case", ["shorter", "different", "no end"])
@torch.no_grad()
def test_a_beginning_that_cannot_be_used_changes_nothing(case, tokenizer):
    last = {"shorter": "a", "different": "a photo of a dog", "no end": "a state of < dog"}[case]
    ids, backbone = tokenizer(["a dog", last]), make_backbone(make_clip())
    beginning = tokenizer(["a state of <"])[0]
    if case == "no end":
        ids[0, :5], ids[0, 5:] = beginning[:5], 0
    assert torch.equal(backbone.encode_text(ids, beginning), backbone.encode_text(ids))
    assert backbone._beginning is None


@torch.no_grad()
def test_text_tree_reads_the_projection_and_the_pooling_of_the_tower(tokenizer):
    ids = tokenizer(TEXTS)
    for clip in (
        text_tower({"proj_bias": True}),  # the projection is a Linear module
        text_tower({"pool_type": "eos", "eos_id": 49407}),
        text_tower({"pool_type": "eos", "eos_id": 11}),  # not in any text, so the first token is pooled
        text_tower(quick_gelu=True),
    ):
        for beginning in (None, ids[2]):
            assert_close(make_backbone(clip).encode_text(ids, beginning), clip.encode_text(ids), atol=4e-6, rtol=1e-6)


@torch.no_grad()
def test_a_text_without_an_end_token_shares_its_prefix():
    """It is pooled at its first token, so its other tokens are computed only for the texts that continue it."""
    clip = text_tower({"pool_type": "eos", "eos_id": 5})
    ids = torch.zeros(2, 77, dtype=torch.long)
    ids[0, :3], ids[1, :4] = torch.tensor([1, 2, 3]), torch.tensor([1, 2, 3, 5])
    assert_close(make_backbone(clip).encode_text(ids), clip.encode_text(ids), atol=4e-6, rtol=1e-6)


@torch.no_grad()
def test_towers_that_cannot_be_trimmed_run_whole(tokenizer):
    """Without a causal mask tokens attend to the padding, and pooling at the last position needs all positions."""
    ids = tokenizer(TEXTS[:3])
    for clip in (text_tower({"no_causal_mask": True}), text_tower({"pool_type": "last"}), make_clip("custom_text")):
        assert torch.equal(make_backbone(clip).encode_text(ids), clip.encode_text(ids))
    assert not make_backbone(text_tower({"no_causal_mask": True})).causal_text


@torch.no_grad()
def test_text_tree_of_the_real_small_clip(clip_small, tokenizer):
    clip = open_clip.create_model(clip_small).eval()
    ids = tokenizer(TEXTS)
    whole = clip.encode_text(ids)
    assert_close(make_backbone(clip).encode_text(ids), whole, atol=2e-6 * float(whole.abs().max()), rtol=0)


@pytest.mark.parametrize("variant", ["native", "custom_text"])
def test_embed_tokens_is_the_vocabulary_table(variant):
    clip = make_clip(variant)
    table = (clip if variant == "native" else clip.text).token_embedding.weight
    ids = torch.tensor([[[0, 49407], [5, 5]]])
    assert torch.equal(make_backbone(clip).embed_tokens(ids), table[ids])


# -- identity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["native", "custom_text"])
def test_hash_changes_with_any_weight(variant):
    clip = make_clip(variant)
    backbone = make_backbone(clip)
    before = {tower: backbone.weights_hash(tower) for tower in ("both", "vision", "text")}
    assert len(set(before.values())) == 3
    weights = {k: v for k, v in clip.state_dict().items() if k != "logit_scale"}
    assert len(weights) > 30
    for name, tensor in weights.items():
        kept, flat = tensor.clone(), tensor.view(-1)
        flat[-1] += 1e-3  # the last element: all bytes count
        changed = "vision" if name.startswith("visual.") else "text"
        assert backbone.weights_hash(changed) != before[changed], name
        assert backbone.weights_hash("vision" if changed == "text" else "text") != before[changed]
        tensor.copy_(kept)
    assert {tower: backbone.weights_hash(tower) for tower in before} == before


def test_hash_of_both_towers_sees_each_tower():
    clip = make_clip()
    before = make_backbone(clip).weights_hash()
    for name in ("visual.proj", "text_projection"):
        changed = copy.deepcopy(clip)
        changed.state_dict()[name][0, 0] += 1
        assert make_backbone(changed).weights_hash() != before


def test_hash_leaves_the_temperature_out():
    backbone = make_backbone(make_clip())
    expected = backbone.weights_hash()
    for shape in ((), (1,)):
        value = backbone.clip.logit_scale.detach().reshape(shape)
        backbone.clip.logit_scale = nn.Parameter(value)
        assert backbone.weights_hash() == expected
    backbone.clip.logit_scale.data += 1
    assert backbone.weights_hash() == expected


def test_hash_sees_what_the_weights_do_not_say():
    """The same weights with another activation, shape or dtype are another model."""
    clip = make_clip()
    quick = make_clip("quickgelu")
    quick.load_state_dict(clip.state_dict())
    reshaped = copy.deepcopy(clip)
    reshaped.visual.proj.data = reshaped.visual.proj.data.reshape(24, 32)
    models = [clip, quick, reshaped, copy.deepcopy(clip).half(), make_clip(seed=1)]
    assert len({make_backbone(m).weights_hash() for m in models}) == len(models)
    assert make_backbone(make_clip()).weights_hash() == make_backbone(clip).weights_hash()
