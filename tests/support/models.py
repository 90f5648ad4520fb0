"""Tiny CLIPs with random weights and action-aware models around them.

The widths of the tiny CLIPs differ (vision 32, text 40, joint 24), so code that assumes equal widths fails.
"""

import json
from functools import cache
from pathlib import Path
from types import MethodType

import torch
from safetensors.torch import save_file

VISION = {"layers": 3, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}  # 16 patches, 2 heads
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 40, "heads": 4, "layers": 2}
EMBED_DIM = 24

# name -> (changes of VISION, changes of TEXT, changes of the CLIP's own arguments)
CLIP_VARIANTS = {
    "native": ({}, {}, {}),
    "custom_text": ({}, {}, {"custom_text": True}),
    "average_pooled": ({"pool_type": "avg"}, {}, {}),
    "attention_pooled": ({"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 4}, {}, {}),
    "quickgelu": ({}, {}, {"quick_gelu": True}),
    "open_clip_4": ({}, {}, {}),  # see `as_in_open_clip_4`
    "layer_scale": ({"ls_init_value": 0.1, "no_ln_pre": True}, {}, {}),  # like the image tower of clip-small
}


def clip_config(variant: str = "native") -> dict:
    """The `model_cfg` of an open_clip config file for a variant of CLIP_VARIANTS."""
    vision, text, own = CLIP_VARIANTS[variant]
    return {"embed_dim": EMBED_DIM, "vision_cfg": {**VISION, **vision}, "text_cfg": {**TEXT, **text}, **own}


def make_clip(variant: str = "native", seed: int = 0) -> torch.nn.Module:
    """A tiny open_clip model with random weights for 3 x 32 x 32 images, in eval mode. Keeps the global seed."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP

    config = clip_config(variant)
    kind = CustomTextCLIP if config.pop("custom_text", False) else CLIP
    vision, text = CLIPVisionCfg(**config.pop("vision_cfg")), CLIPTextCfg(**config.pop("text_cfg"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = kind(vision_cfg=vision, text_cfg=text, **config).eval()
        for name, parameter in clip.named_parameters():
            if parameter.ndim < 2 and "logit" not in name:  # initial biases and norms would hide errors
                parameter.data += 0.1 * torch.randn_like(parameter)
    if variant == "open_clip_4":
        as_in_open_clip_4(clip)
    return clip


def as_in_open_clip_4(clip: torch.nn.Module) -> None:
    """Turns a CLIP into one of open_clip 4, if an older open_clip is installed.

    There, transformers have no `batch_first`, and blocks have their own attention module with the weights of
    `nn.MultiheadAttention` and no fast path.
    """
    from open_clip.transformer import ResidualAttentionBlock, Transformer

    if not hasattr(clip.transformer, "batch_first"):
        return  # already a CLIP of open_clip 4

    class Attention(torch.nn.Module):
        def __init__(self, old: torch.nn.MultiheadAttention):
            super().__init__()
            self.num_heads, self.out_proj = old.num_heads, old.out_proj
            self.in_proj_weight, self.in_proj_bias = old.in_proj_weight, old.in_proj_bias

        def forward(self, x, k_x=None, v_x=None, attn_mask=None):
            parts = torch.nn.functional.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
            parts = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
            attended = torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=attn_mask)
            return self.out_proj(attended.transpose(1, 2).flatten(2))

    def attention(block, q_x, k_x=None, v_x=None, attn_mask=None):
        return block.attn(q_x, attn_mask=attn_mask)

    def forward(transformer, x, attn_mask=None):
        for block in transformer.resblocks:
            x = block(x, attn_mask=attn_mask)
        return x

    for module in list(clip.modules()):
        if isinstance(module, ResidualAttentionBlock):
            module.attn, module.attention = Attention(module.attn), MethodType(attention, module)
        elif isinstance(module, Transformer):
            del module.batch_first
            module.forward = MethodType(forward, module)


@cache
def clip_tokenizer():
    """CLIP's own tokenizer (49,408 byte pairs, 77 tokens), which open_clip ships."""
    from open_clip import SimpleTokenizer

    return SimpleTokenizer()


def make_model(variant: str = "native", trained: bool = False, clip_seed: int = 0, **prompt_settings):
    """An `ActionAwareCLIP` around `make_clip`; see `model_around`."""
    return model_around(make_clip(variant, clip_seed), trained, **prompt_settings)


def model_around(clip: torch.nn.Module, trained: bool = False, **prompt_settings):
    """An `ActionAwareCLIP` around a CLIP, with CLIP's tokenizer. `trained` adds noise to its own parameters.

    Without this noise the gate is zero and hides everything before it.
    """
    from amp.model.clip import ActionAwareCLIP
    from amp.model.config import PromptConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = ActionAwareCLIP(clip, PromptConfig(**prompt_settings), clip_tokenizer())
        if trained:
            shake(model)
    return model


def shake(model, scale: float = 0.1, generator: torch.Generator | None = None) -> None:
    """Adds noise to a model's own parameters, as if it had been trained."""
    for name, parameter in model.named_parameters():
        if not name.startswith("backbone."):
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)


def make_aim(variant: str = "native", trained: bool = False, clip_seed: int = 0, **settings):
    """`make_model` with the paper's AIM; see `aim_settings`."""
    return make_model(variant, trained, clip_seed, **aim_settings(**settings))


def aim_settings(block: int = 0, options: dict | None = None, **settings) -> dict:
    """Arguments of `PromptConfig` for the paper's AIM without text enrichment, for CLIPs with 3 blocks.

    Args:
        block: First prompted block.
        options: Options of the interaction, in addition to a bottleneck of 4. With the default, 40 / 16 hidden
            units, often all units would be zero.
        **settings: Further arguments.
    """
    options = {"bottleneck": 4, **(options or {})}
    return {
        "interaction": "aim",
        "interaction_options": options,
        "depth": block / 3,
        "num_prompts": 4,
        "enrich": False,
        **settings,
    }


def write_clip_folder(folder: Path, variant: str = "native", seed: int = 0) -> str:
    """Writes a tiny CLIP in open_clip's own format and returns its model name, ``local-dir:FOLDER``."""
    return write_model_folder(folder, clip_config(variant), make_clip(variant, seed))


def write_model_folder(folder: Path, model_cfg: dict, clip: torch.nn.Module, size: int = 32, std: float = 0.25) -> str:
    """Writes a model in open_clip's own format and returns its name, ``local-dir:FOLDER``.

    Args:
        folder: Folder to write; created if it is missing.
        model_cfg: Configuration of the model.
        clip: Model whose weights are written.
        size: Side of the images in pixels.
        std: Standard deviation by which pixels are normalized.
    """
    write_model_config(folder, model_cfg, size, std)
    weights = {name: x.contiguous() for name, x in clip.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def write_model_config(folder: Path, model_cfg: dict, size: int = 32, std: float = 0.25) -> None:
    """Writes the `open_clip_config.json` of a model; see `write_model_folder`."""
    preprocess = {
        "size": size,
        "mode": "RGB",
        "mean": [0.5] * 3,
        "std": [std] * 3,
        "interpolation": "bicubic",
        "resize_mode": "squash",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess}))


def publish_random_adapter(base: str, folder: Path, seed: int = 2) -> Path:
    """Writes the published folder of an action-aware adapter with random weights for a base model.

    Args:
        base: Name of the base model, such as ``local-dir:FOLDER``.
        folder: Folder to write.
        seed: Seed of the weights.

    Returns:
        The folder.
    """
    import amp

    config = amp.PromptConfig(interaction_options={"blocks": 1}, depth=1 / 3, num_prompts=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, _, _ = amp.create_model_and_transforms(base, prompt_config=config)
        shake(model, scale=0.3)
    folder.mkdir(parents=True)
    amp.save_adapter(folder / "adapter.safetensors", model)
    return amp.save_pretrained(folder, folder)
