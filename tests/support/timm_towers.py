"""Tiny random CLIPs with timm image towers and Hugging Face text towers.

open_clip's own factory builds them: the image towers are registered with timm, and the text tower and its tokenizer
are in the model's folder.
"""

import copy
import tempfile
from functools import cache
from pathlib import Path

import open_clip
import torch
from timm.models import register_model
from timm.models.eva import Eva
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock, VisionTransformer

from support.models import EMBED_DIM, TEXT, model_around, write_model_config, write_model_folder

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "mlp_ratio": 2}  # 16 patches
ROTARY = {"use_rot_pos_emb": True, "ref_feat_shape": (2, 2)}

# name -> (class, its settings, timm_pool, timm_proj, tokens before the patches)
TOWERS = {
    "siglip": (VisionTransformer, {"class_token": False, "global_pool": "map"}, "map", "none", 0),
    "vit_token": (VisionTransformer, {"pre_norm": True}, "token", None, 1),
    "vit_registers": (
        VisionTransformer,
        {"reg_tokens": 3, "init_values": 0.5, "dynamic_img_size": True, "patch_drop_rate": 0.5, "pos_drop_rate": 0.5},
        "avg",
        "linear",
        4,
    ),
    "vit_post_norm": (
        VisionTransformer,
        {"block_fn": ResPostBlock, "class_token": False, "global_pool": "avg", "no_embed_class": True},
        "avg",
        "mlp",
        0,
    ),
    "eva02": (
        Eva,
        {
            **ROTARY,
            "qkv_fused": False,
            "swiglu_mlp": True,
            "scale_mlp": True,
            "scale_attn_inner": True,
            "global_pool": "token",
            "patch_drop_rate": 0.5,
        },
        "token",
        None,
        1,
    ),
    "eva_average": (Eva, {**ROTARY, "num_reg_tokens": 2, "init_values": 0.5}, "avg", "linear", 3),
    "eva01": (Eva, {"use_post_norm": True, "global_pool": "token"}, "token", None, 1),
    "perception": (
        Eva,
        {
            **ROTARY,
            "global_pool": "map",
            "attn_type": "rope",
            "use_pre_transformer_norm": True,
            "rope_grid_offset": 1.0,
            "rope_grid_indexing": "xy",
            "dynamic_img_size": True,
        },
        "map",
        None,
        1,
    ),
    "eva_mixed": (
        Eva,
        {
            "use_rot_pos_emb": True,
            "rope_type": "mixed",
            "attn_type": "rope",
            "use_abs_pos_emb": False,
            "rope_temperature": 10.0,
            "global_pool": "token",
            "num_reg_tokens": 1,
            "rope_rotate_half": False,
        },
        "token",
        None,
        2,
    ),
}
# The class is supported, but some of these parts are not.
STRANGE = {"parallel": (VisionTransformer, {"block_fn": ParallelScalingBlock}, "token", None, 1)}


def _register(name, kind, settings):
    def build(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **given):
        model = kind(**{**SIZES, **settings, **given})
        model.default_cfg = {}
        return model

    build.__name__ = f"amp_tiny_{name}"
    register_model(build)


for _name, (_kind, _settings, *_) in {**TOWERS, **STRANGE}.items():
    _register(_name, _kind, _settings)


def tower_config(tower: str, text: dict | None = None) -> dict:
    """The `model_cfg` of an open_clip config file. SigLIP has no projection, so its joint width is the tower's."""
    _, _, pool, proj, _ = {**TOWERS, **STRANGE}[tower]
    vision = {
        "timm_model_name": f"amp_tiny_{tower}",
        "timm_model_pretrained": False,
        "timm_pool": pool,
        "timm_proj": proj,
        "image_size": 32,
    }
    return {
        "embed_dim": 32 if proj == "none" else EMBED_DIM,
        "vision_cfg": vision,
        "text_cfg": text or TEXT,
        "custom_text": True,
        "init_logit_bias": -10.0,
    }


def write_folder(folder: Path, model_cfg: dict, seed: int = 0) -> str:
    """Writes a model with random weights in open_clip's own format and returns its name, ``local-dir:FOLDER``."""
    write_model_config(folder, model_cfg)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = open_clip.create_model(
            f"local-dir:{folder}", load_weights=False, pretrained_image=False, pretrained_text=False
        ).eval()
        for name, parameter in clip.named_parameters():
            # Biases, norms, tokens and matrices that start near zero would hide errors.
            if "logit" not in name and "freqs" not in name:
                scale = 0.2 if parameter.ndim == 2 and name.startswith("visual.") else 0.1
                parameter.data += scale * torch.randn_like(parameter)
    return write_model_folder(folder, model_cfg, clip)


@cache
def _built(tower: str, seed: int):
    with tempfile.TemporaryDirectory() as folder:
        return open_clip.create_model(write_folder(Path(folder), tower_config(tower), seed)).eval()


def make_timm_clip(tower: str, seed: int = 0):
    """A tiny CLIP with an image tower of `TOWERS` and a native text tower, in eval mode."""
    return copy.deepcopy(_built(tower, seed)).requires_grad_(False)


def make_timm_model(tower: str, trained: bool = False, **prompt_settings):
    """An `ActionAwareCLIP` around `make_timm_clip`; see `model_around`."""
    return model_around(make_timm_clip(tower), trained, **prompt_settings)


# -- Hugging Face text towers -----------------------------------------------------------------------------------------

WORDS = ("a", "dog", "girl", "horse", "boy", "chases", "kicks", "carries", "throws", "ball", "kite", "is", "red", "of")


def write_text_tower(folder: Path, kind: str) -> dict:
    """Writes configuration and tokenizer of a tiny text tower; returns the `text_cfg` of an open_clip config.

    The tokenizer is a SentencePiece model with XLM-R's padding (token 1). ``mt5`` is the encoder of an encoder-decoder.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import BertConfig, MT5Config, PreTrainedTokenizerFast, XLMRobertaConfig

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = [(word, 0.0) for word in special] + [("▁", -2.0)] + [(f"▁{word}", -3.0) for word in WORDS]
    pieces += [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789.,<>-"]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    sizes = {"vocab_size": len(pieces), "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    if kind == "mt5":
        config = MT5Config(**sizes, d_model=40, d_kv=10, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=1)
    else:
        config = {"xlm-roberta": XLMRobertaConfig, "bert": BertConfig}[kind](
            **sizes,
            hidden_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=120,
        )
    folder.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(folder)
    config.save_pretrained(folder)
    return {
        "hf_model_name": str(folder),
        "hf_tokenizer_name": str(folder),
        "context_length": 96,
        "hf_pooler_type": "cls_pooler" if kind == "bert" else "mean_pooler",
    }
