"""Each layer compared with a naive implementation of its equation in `support/equations/`."""

import contextlib
import math

import pytest
import torch
from support.equations import image_features, layers
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from amp.model.layers.interaction import ActionAwareInteraction, CrossAttention, SelfAttentionWithMap
from amp.model.layers.prompt_adapter import PromptAdapter
from amp.model.layers.transformer_block import TransformerBlock
from amp.model.layers.triplet_encoder import TripletEncoder, with_null
from amp.model.layers.visual_prompts import VisualPrompts

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(3)


def shaken(layer, scale=0.2):
    """Adds noise, because initial values such as a norm's scale of one or a gate of zero would hide errors."""
    for parameter in layer.parameters():
        parameter.data += scale * torch.randn_like(parameter)
    return layer


# -- triplet encoder, eq. 4-5 -----------------------------------------------------------------------------------------


def triplets(masks, slots=3, size=4, width=24):
    """Random embedded triplets; `masks` are the existing triplets of each caption. Slots have 0 to `size` tokens."""
    mask = torch.tensor(masks, dtype=torch.bool)
    embedded = torch.randn(*mask.shape, slots, size, width)
    lengths = torch.randint(0, size + 1, (*mask.shape, slots, 1))
    return embedded, torch.arange(size) < lengths, mask


@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])  # torch has a fused path for inference
def test_triplet_encoder_is_eq_4_and_5(grad):
    encoder = shaken(TripletEncoder(24, layers=2, heads=4)).train(grad)
    embedded, token_mask, mask = triplets([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    token_mask[0, 0] = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])  # "man jumps": no object
    with torch.set_grad_enabled(grad):
        prompts = encoder(embedded, token_mask, mask)
    for c in range(4):
        expected = layers.triplet_prompts(encoder, embedded[c], token_mask[c], mask[c])
        assert len(expected) == max(1, int(mask[c].sum()))
        assert_close(prompts[c, : len(expected)], expected, **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # tokens may come from a linear layer
@pytest.mark.parametrize("counted", [False, True])
def test_autocast_means_the_same_in_training_and_in_evaluation(counted, dtype):
    """The fast path of torch's block in evaluation returns bf16 for fp32 and fails under a FLOP counter."""
    block, tokens = shaken(TransformerBlock(24, heads=4)), torch.randn(3, 5, 24).to(dtype)
    absent = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 1, 0, 0, 1]], dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        expected = block.train()(tokens, absent)
        with torch.no_grad(), FlopCounterMode(display=False) if counted else contextlib.nullcontext():
            found = block.eval()(tokens, absent)
    assert found.dtype == expected.dtype == dtype
    assert_close(found, expected, atol=3e-2, rtol=3e-2)
    assert_close(found.float(), block(tokens.float(), absent), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("slot", [0, 1, 2])
def test_triplet_encoder_tells_the_slots_apart(slot):
    """(dog, chases, cat) differs from (cat, chases, dog), because each slot has its own part of the projection."""
    encoder = shaken(TripletEncoder(24, layers=1, heads=4))
    embedded, token_mask, mask = triplets([[1]])
    token_mask[:] = True
    other = (slot + 1) % 3
    swapped = embedded.clone()
    swapped[:, :, [slot, other]] = embedded[:, :, [other, slot]]
    assert (encoder(embedded, token_mask, mask) - encoder(swapped, token_mask, mask)).abs().max() > 0.01


def test_tokens_and_triplets_outside_the_masks_change_nothing():
    encoder = shaken(TripletEncoder(24, layers=2, heads=4))
    embedded, token_mask, mask = triplets([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    garbage = torch.where(token_mask[..., None] & mask[..., None, None, None], embedded, 1e3 * torch.randn(()))
    garbage_mask = torch.where(mask[..., None, None], token_mask, True)
    clean, dirty = encoder(embedded, token_mask, mask), encoder(garbage, garbage_mask, mask)
    seen = mask.clone()
    seen[2, 0] = True  # the null token
    assert_close(clean[seen], dirty[seen], atol=0, rtol=0)


def test_with_null_fills_row_0_of_empty_captions_only():
    prompts, null = torch.randn(3, 2, 5), torch.randn(5)
    filled, mask = with_null(prompts, torch.tensor([[1, 1], [0, 1], [0, 0]], dtype=torch.bool), null)
    assert mask.tolist() == [[True, True], [False, True], [True, False]]
    assert torch.equal(filled[:2], prompts[:2])
    assert torch.equal(filled[2, 0], null) and torch.equal(filled[2, 1], prompts[2, 1])


# -- adapter, eq. 6 ---------------------------------------------------------------------------------------------------


def test_adapter_is_eq_6():
    adapter, prompts = shaken(PromptAdapter(24, 3, 32)), torch.randn(2, 5, 24)
    assert_close(adapter(prompts), layers.adapt(prompts, adapter), **TOLERANCE)
    assert {name for name, _ in adapter.named_parameters()} == {"norm.weight", "norm.bias", "down.weight", "up.weight"}


# -- interaction, eq. 7-8 ---------------------------------------------------------------------------------------------

MASK = torch.tensor([[1, 1, 1], [0, 1, 0], [1, 0, 1]], dtype=torch.bool)


def test_cross_attention_lets_patches_ask_existing_prompts():
    layer, patches, prompts = shaken(CrossAttention(32, heads=4)), torch.randn(3, 6, 32), torch.randn(3, 3, 32)
    out = layer(layer.query(patches), prompts, MASK)
    for p in range(3):
        expected = layers.cross_attention(patches[p], prompts[p][MASK[p]], layer)
        assert_close(out[p], expected, **TOLERANCE)


def test_self_attention_returns_values_and_the_map_over_all_heads():
    layer, x = shaken(SelfAttentionWithMap(32, heads=4)), torch.randn(3, 6, 32)
    values, maps = layer(x)
    assert_close(maps.sum(dim=-1), torch.ones(3, 6))
    for p in range(3):
        expected_values, expected_map = layers.self_attention(x[p], layer)
        assert_close(values[p], expected_values, **TOLERANCE)
        assert_close(maps[p], expected_map, **TOLERANCE)


@pytest.mark.parametrize(("residual", "lam"), [(False, 0.7), (True, 0.7), (False, 1.0), (True, 0.0)])
def test_interaction_is_eq_7_and_8(residual, lam):
    aim = shaken(ActionAwareInteraction(32, heads=2, lam=lam, residual=residual))
    assert (aim.gate is not None) == residual
    patches, triplets, states = torch.randn(2, 6, 32), torch.randn(3, 3, 32), torch.randn(3, 3, 32)
    image_index = torch.tensor([1, 0, 1])
    out, map_t, map_s = aim(patches, triplets, states, MASK, image_index, return_maps=True)
    assert out.shape == (3, 6, 32) and map_t.shape == map_s.shape == (3, 6, 6)
    for p in range(3):
        expected, expected_t, expected_s = image_features.interact(
            aim, patches[image_index[p]], triplets[p][MASK[p]], states[p][MASK[p]]
        )
        assert_close(out[p], expected, **TOLERANCE)
        assert_close(map_t[p], expected_t, **TOLERANCE)
        assert_close(map_s[p], expected_s, **TOLERANCE)
    assert torch.equal(aim(patches, triplets, states, MASK, image_index), out)


def test_gate_starts_at_zero_and_learns_at_once():
    """At step 0 patches are unchanged, bit for bit. The gate has a gradient; without it no other layer would learn."""
    aim = ActionAwareInteraction(32, heads=2)
    patches, prompts = torch.randn(3, 6, 32), torch.randn(3, 3, 32)
    out = aim(patches, prompts, prompts, MASK, torch.arange(3))
    assert torch.equal(out, patches)
    (out * torch.randn_like(out)).sum().backward()
    assert aim.gate.grad.abs().min() > 0
    assert aim.mlp[0].weight.grad.abs().max() == 0


# -- visual prompts ---------------------------------------------------------------------------------------------------


def test_visual_prompts_are_appended_then_replaced():
    layer, tokens = VisualPrompts(2, 3, 32, (8, 8)), torch.randn(4, 17, 32)
    first = layer(tokens, 0, 17)
    assert torch.equal(first, torch.cat([tokens, layer.prompts[0].expand(4, 3, 32)], dim=1))
    second = layer(first + 1, 1, 17)
    assert torch.equal(second, torch.cat([tokens + 1, layer.prompts[1].expand(4, 3, 32)], dim=1))


def test_no_visual_prompts_leave_tokens_alone():
    tokens = torch.randn(4, 17, 32)
    assert VisualPrompts(2, 0, 32, (8, 8))(tokens, 1, 17) is tokens


def test_visual_prompts_start_in_vpts_range():
    """U(-v, v) with v^2 = 6 / (3 p_h p_w + d_v) (arXiv 2203.12119, its reference code)."""
    prompts, bound = VisualPrompts(4, 50, 32, (8, 4)).prompts, math.sqrt(6 / (3 * 8 * 4 + 32))
    assert prompts.abs().max() <= bound
    assert prompts.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
