"""Model creation with the interface of open_clip."""

import logging
from difflib import get_close_matches
from pathlib import Path
from pickle import UnpicklingError
from typing import TypeVar

import open_clip
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.timm_model import TimmModel
from safetensors import SafetensorError

from amp.device import usable_device
from amp.errors import AmpError
from amp.extras import missing
from amp.json_text import parse_json
from amp.model.adapter import load_adapter_state, read_adapter
from amp.model.clip import ActionAwareCLIP
from amp.model.config import PromptConfig
from amp.model.towers import make_backbone
from amp.model.towers.base import CHOOSE

Model = TypeVar("Model", bound=torch.nn.Module)
LOADING_ERRORS = (
    RuntimeError,
    OSError,
    ValueError,
    TypeError,
    KeyError,
    ImportError,
    AssertionError,
    SafetensorError,
    UnpicklingError,
)
"""Exceptions of open_clip for weights it can't get or read, keys of another version, and missing packages."""
LOW_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


def create_model_and_transforms(
    model_name: str,
    pretrained: str | None = None,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    prompt_config: PromptConfig | None = None,
    adapter: str | None = None,
    **open_clip_kwargs,
):
    """Builds an action-aware CLIP. Mirrors `open_clip.create_model_and_transforms` and its three return values.

    Args:
        model_name: Model of open_clip: a name, `local-dir:FOLDER` or `hf-hub:ORG/REPO`.
        pretrained: Weights of open_clip: a tag or a file. None for `local-dir:` and `hf-hub:` models.
        precision: `fp32` (in training, combined with autocast), or `bf16`/`fp16` for frozen weights in low precision.
        device: Device of the model; `meta` builds only shapes.
        prompt_config: Settings of the prompts. Not allowed together with `adapter`, whose file contains them.
        adapter: Adapter file to load.
        **open_clip_kwargs: Further arguments of `open_clip.create_model_and_transforms`, such as
            `image_resize_mode="squash"` or `cache_dir`.

    Returns:
        `ActionAwareCLIP`, the training transform and the validation transform. Neither flips images, because captions
        mention left and right.

    Raises:
        AmpError: The QuickGELU settings of model and weights differ, a tower is unsupported, the adapter belongs to
            another base model, the device doesn't exist, or weights can't be downloaded or read.
    """
    if precision not in ("fp32", *LOW_PRECISION):
        raise AmpError(f"precision is {precision!r}, expected one of fp32, bf16, fp16")
    if adapter is not None and prompt_config is not None:
        raise AmpError("give either prompt_config or adapter: an adapter file holds the settings it was trained with")
    meta = str(device) == "meta"
    if not meta:
        device = usable_device(device)
    refuse_unsupported_model(model_name, prompted=True)
    clip, preprocess_train, preprocess_val = load_clip(model_name, pretrained, meta, **open_clip_kwargs)
    with torch.device("meta" if meta else "cpu"):
        base_hash = make_backbone(clip).weights_hash()
        clip = to_precision(clip, precision)
        if adapter is not None:
            header, weights = read_adapter(adapter)
            header.check_base(model_name, base_hash, where=adapter)
            prompt_config = header.prompt_config
        model = ActionAwareCLIP(clip, prompt_config, get_tokenizer(model_name))
        model.base_name, model.base_pretrained, model.base_hash = model_name, pretrained, base_hash
        if adapter is not None:
            load_adapter_state(model, header, weights, where=adapter)
    model.to(device)
    if precision == "fp32":
        model.backbone.remember_hash(base_hash)
    return model, preprocess_train, preprocess_val


def load_clip(model_name: str, pretrained: str | None = None, meta: bool = False, **open_clip_kwargs):
    """Loads any model of open_clip in fp32 on the CPU, with its two transforms. `meta` builds only shapes.

    Weights are loaded in fp32 regardless of the wanted precision, because their hash identifies the base model in
    adapters and caches.

    Raises:
        AmpError: The QuickGELU settings of model and weights differ, the model is not a CLIP, or weights can't be
            downloaded or read.
    """
    refuse_quick_gelu_mismatch(model_name, pretrained, open_clip_kwargs.get("force_quick_gelu", False))
    refuse_unknown_model(model_name, pretrained)
    refuse_unsupported_model(model_name, prompted=False)
    device = "meta" if meta else "cpu"
    with torch.device(device):
        try:
            return open_clip.create_model_and_transforms(model_name, pretrained, device=device, **open_clip_kwargs)
        except LOADING_ERRORS as error:
            raise AmpError(
                f"model {model_name!r} with pretrained {pretrained!r}: open_clip {open_clip.__version__} can't "
                f"load it ({reason(error)}). Check the network, or give local files: local-dir:FOLDER as the "
                "model, or a file as its pretrained weights. A newer model may need a newer open_clip"
            ) from error


def reason(error: Exception) -> str:
    """First line of an error raised in open_clip, or the package to install."""
    text = missing(error, "its text tower") if isinstance(error, ImportError) else None
    return text or (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def to_precision(clip: Model, precision: str) -> Model:
    """Casts the weights to `fp32`, `bf16` or `fp16`, in the same way as open_clip."""
    if precision in LOW_PRECISION:
        dtype, timm = LOW_PRECISION[precision], isinstance(clip.visual, TimmModel)
        if not timm:
            open_clip.convert_weights_to_lp(clip, dtype)
        for tower in clip.children():
            # Norms and embeddings from other libraries don't mix types as open_clip's do, so whole towers are cast.
            # With an image tower of timm, both towers are cast, as in open_clip, but not the temperature.
            if timm or isinstance(tower, HFTextEncoder):
                tower.to(dtype)
    return clip


def get_tokenizer(model_name: str):
    """Loads the base model's tokenizer with `open_clip.get_tokenizer`.

    Raises:
        AmpError: The tokenizer's files can't be downloaded or read, or a package is missing.
    """
    try:
        return open_clip.get_tokenizer(model_name)
    except LOADING_ERRORS as error:
        raise AmpError(
            f"model {model_name!r}: open_clip can't load its tokenizer ({reason(error)}). Check the network, or load "
            "the model once while connected"
        ) from error


def refuse_unsupported_model(model_name: str, prompted: bool) -> None:
    """Refuses architectures that can't work, judging by their configuration, before weights are downloaded.

    Models of the Hugging Face Hub are checked by their towers, after loading.

    Args:
        model_name: Model of open_clip.
        prompted: Whether the model gets prompts. A baseline needs only image and text features.

    Raises:
        AmpError: The architecture can't work. The message names the key of the configuration.
    """
    config: dict = {}
    if model_name.startswith("local-dir:"):
        path = Path(model_name.removeprefix("local-dir:")) / "open_clip_config.json"
        try:
            config = parse_json(path.read_text(encoding="utf-8"))["model_cfg"]
        except (OSError, ValueError, TypeError, KeyError):
            return  # refused when it is loaded
    elif ":" not in model_name:
        config = open_clip.get_model_config(model_name.replace("/", "-")) or {}
    for key in ("genlip_cfg", "genlap_cfg", "audio_cfg"):
        if key in config:
            why = "it generates captions" if key == "genlip_cfg" else "its input is audio"
            raise AmpError(f"model {model_name!r} has the key {key}: {why}, expected a CLIP of images. {CHOOSE}")
    timm = str(config.get("vision_cfg", {}).get("timm_model_name"))
    if prompted and timm.startswith("naflexvit"):
        raise AmpError(
            f"model {model_name!r} has vision_cfg.timm_model_name {timm!r}, expected timm's VisionTransformer or Eva: "
            f"a NaFlex tower takes any number of patches, but prompts need the same number for each image. {CHOOSE}"
        )
    text = config.get("text_cfg", {}).get("text_arch", "clip")
    if prompted and text != "clip":
        raise AmpError(
            f"model {model_name!r} has text_cfg.text_arch {text!r}, expected 'clip', or hf_model_name: triplets need "
            f"CLIP's own tokenizer or one of Hugging Face. {CHOOSE}"
        )


def refuse_unknown_model(model_name: str, pretrained: str | None) -> None:
    """Refuses models and weights that don't exist, for which open_clip would raise a list of everything it knows.

    Raises:
        AmpError: The model or its weights don't exist. The message lists the closest names.
    """
    if model_name.startswith("local-dir:"):
        folder = Path(model_name.removeprefix("local-dir:"))
        if not (folder / "open_clip_config.json").is_file():
            raise AmpError(
                f"model {model_name!r}: no file {folder / 'open_clip_config.json'}, expected a folder that open_clip "
                "saved; correct the model's name"
            )
        if not any(path.suffix in (".safetensors", ".bin", ".pth") for path in folder.iterdir()):
            raise AmpError(
                f"model {model_name!r}: no weights in {folder}, expected a file such as open_clip_model.safetensors; "
                "without one open_clip uses random weights. Copy the whole folder"
            )
    elif ":" not in model_name:
        name = model_name.replace("/", "-")
        if open_clip.get_model_config(name) is None:
            close = get_close_matches(name, open_clip.list_models(), cutoff=0.5)
            raise AmpError(
                f"model {model_name!r} is unknown to open_clip {open_clip.__version__}, expected a name of "
                f"open_clip.list_models(){', such as ' + ', '.join(close) if close else ''}, or local-dir:FOLDER"
            )
        if pretrained and not open_clip.get_pretrained_cfg(name, pretrained) and not Path(pretrained).is_file():
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
            raise AmpError(f"weights {pretrained!r} of model {model_name!r}: no such tag or file; tags known: {tags}")


def refuse_quick_gelu_mismatch(model_name: str, pretrained: str | None, force_quick_gelu: bool = False) -> None:
    """Refuses weights trained with one GELU variant in a model that computes the other. open_clip only warns.

    Raises:
        AmpError: The variants differ. The message names the model to use instead.
    """
    if not pretrained or ":" in model_name:
        return
    name = model_name.replace("/", "-")
    # A tag may be known only under the other name: ViT-B-32-quickgelu has no laion2b_s34b_b79k.
    other = name.removesuffix("-quickgelu") if name.endswith("-quickgelu") else f"{name}-quickgelu"
    tag = open_clip.get_pretrained_cfg(name, pretrained) or open_clip.get_pretrained_cfg(other, pretrained)
    config = open_clip.get_model_config(name)
    if config is None or not tag:
        return
    has = bool(config.get("quick_gelu", False)) or force_quick_gelu
    needs = bool(tag.get("quick_gelu", False))
    if has != needs:
        raise AmpError(
            f"model {model_name!r} has quick_gelu={has}, but its weights {pretrained!r} were trained with "
            f"quick_gelu={needs}, expected the same. Use model {other!r}"
        )


def quiet_open_clip() -> None:
    """Hides open_clip's info messages; its warnings stay visible."""
    logging.getLogger().setLevel(logging.WARNING)
