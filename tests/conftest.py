"""What tests share: tiny random CLIPs, a base model on disk, knowledge of four captions, the real data if it is there.

The widths of the tiny CLIPs differ (vision 32, text 40, joint 24), since nothing may assume that they are equal.
"""

import json
import multiprocessing
import os
import signal
from functools import cache
from pathlib import Path
from types import MethodType

import pytest
import torch
from helpers import aim_settings, distributions, fresh_accelerate, shards  # noqa: F401, fixtures
from language_models import smollm2  # noqa: F401, fixture
from slurm_helpers import slurm  # noqa: F401, fixture

from amp.knowledge.schema import Knowledge, Triplet

# Before anything starts the server: processes of several ranks are forked from it with all imports done.
multiprocessing.get_context("forkserver").set_forkserver_preload(
    ["torch", "open_clip", "amp.model.clip", "amp.retrieval.split_search", "amp.train.engine"]
)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, with their children
torch.set_num_threads(1)  # tiny tensors gain nothing from more, and threads that spin stop the other tests
ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("AMP_SHARED", ROOT.parent / "shared"))

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
    "layer_scale": ({"ls_init_value": 0.1, "no_ln_pre": True}, {}, {}),  # as clip-small's image tower
}


def clip_config(variant: str = "native") -> dict:
    """The `model_cfg` of an open_clip config file for a variant of CLIP_VARIANTS."""
    vision, text, own = CLIP_VARIANTS[variant]
    return {"embed_dim": EMBED_DIM, "vision_cfg": {**VISION, **vision}, "text_cfg": {**TEXT, **text}, **own}


def make_clip(variant: str = "native", seed: int = 0) -> torch.nn.Module:
    """A tiny open_clip model with random weights, 3 x 32 x 32 images, in eval mode; the global seed stays as it was."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP

    config = clip_config(variant)
    kind = CustomTextCLIP if config.pop("custom_text", False) else CLIP
    vision, text = CLIPVisionCfg(**config.pop("vision_cfg")), CLIPTextCfg(**config.pop("text_cfg"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = kind(vision_cfg=vision, text_cfg=text, **config).eval()
        for name, parameter in clip.named_parameters():
            if parameter.ndim < 2 and "logit" not in name:  # no bias or norm may be an identity by its initial value
                parameter.data += 0.1 * torch.randn_like(parameter)
    if variant == "open_clip_4":
        as_in_open_clip_4(clip)
    return clip


def as_in_open_clip_4(clip: torch.nn.Module) -> None:
    """Stands in for a CLIP of open_clip 4 where an older one is installed: its transformers have no `batch_first`, and
    blocks an attention of their own, with the weights of `nn.MultiheadAttention` and no fast path."""
    from open_clip.transformer import ResidualAttentionBlock, Transformer

    if not hasattr(clip.transformer, "batch_first"):
        return  # it is one

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
    """An `ActionAwareCLIP` around `make_clip`, with a tokenizer; `trained` shakes its own parameters.

    Without that the gate is zero, behind which a test sees nothing.
    """
    from amp.model.clip import ActionAwareCLIP
    from amp.model.config import PromptConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = ActionAwareCLIP(make_clip(variant, clip_seed), PromptConfig(**prompt_settings), clip_tokenizer())
        if trained:
            for name, parameter in model.named_parameters():
                if not name.startswith("backbone."):
                    parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def make_aim(variant: str = "native", trained: bool = False, clip_seed: int = 0, **settings):
    """`make_model` of the paper's AIM; see `aim_settings`."""
    return make_model(variant, trained, clip_seed, **aim_settings(**settings))


def write_clip_folder(folder: Path, variant: str = "native", seed: int = 0) -> str:
    """Writes a tiny CLIP in open_clip's own format and returns its model name, ``local-dir:FOLDER``."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {
        "size": VISION["image_size"],
        "mode": "RGB",
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "interpolation": "bicubic",
        "resize_mode": "squash",
    }
    config = {"model_cfg": clip_config(variant), "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(make_clip(variant, seed).state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


@pytest.fixture
def tiny_clip():
    """`tiny_clip(variant="native", seed=0)` builds a fresh tiny CLIP; see `CLIP_VARIANTS`."""
    return make_clip


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> str:
    """Name of a tiny base model on disk, ``local-dir:FOLDER``; read only."""
    return write_clip_folder(tmp_path_factory.mktemp("base") / "tiny-clip")


@pytest.fixture(scope="session")
def tokenizer():
    """See `clip_tokenizer`."""
    return clip_tokenizer()


@pytest.fixture(scope="session")
def knowledge() -> list[Knowledge]:
    """Knowledge of four captions with 1, 3, 0 and 8 triplets; an intransitive action and attributes among them."""

    def item(*triplets):
        states = tuple(f"The {t[0]} is seen while it {t[1]} {t[2]}".strip() for t in triplets)
        return Knowledge(tuple(Triplet(*t) for t in triplets), states)

    return [
        item(("dog", "jumps", "")),
        item(("girl", "is", "small", "attribute"), ("girl", "studies", "laptop"), ("boy", "throws", "a big red ball")),
        item(),
        item(*((f"man {i}", "chases", f"horse {i}", "attribute" if i % 2 else "action") for i in range(8))),
    ]


@pytest.fixture
def images() -> torch.Tensor:
    """Four random images for the tiny CLIPs (4, 3, 32, 32)."""
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="session")
def flickr8k() -> Path:
    """Folder of Flickr8k's photos, captions and knowledge; skips where it is absent."""
    return _shared("data/flickr8k", "dataset_flickr8k.json")


@pytest.fixture(scope="session")
def clip_small() -> str:
    """Name of the small real CLIP, ``local-dir:FOLDER``; skips where it is absent."""
    return f"local-dir:{_shared('models/clip-small', 'open_clip_config.json')}"


def _shared(folder: str, proof: str) -> Path:
    path = SHARED / folder
    if not (path / proof).is_file():
        pytest.skip(f"needs {proof} in {path}, real data that is not in the repository; set AMP_SHARED to its folder")
    return path
