"""GGUF files: read once, kept as safetensors, since transformers takes half a minute to unpack a small one."""

from __future__ import annotations

from pathlib import Path

from amp.errors import require
from amp.files import sha256_of
from amp.folders import build_folder
from amp.generation.engines.base import EngineError

DEFAULT_FOLDER = Path("~/.cache/open-clip-amp/gguf")


def unpack(path: Path, folder: Path | None = None) -> tuple[Path, dict[str, str]]:
    """The model of a GGUF file as a folder that transformers loads in a second.

    Args:
        path: The file; its quantised weights are unpacked to float32, four bytes per weight.
        folder: Where unpacked models are kept; ``~/.cache/open-clip-amp/gguf`` by default.

    Returns:
        The folder, and what decides the weights: the file's name and sha256.

    Raises:
        EngineError: Not a GGUF file that transformers can read, or the folder can't be written.
    """
    transformers = require("transformers", "the transformers engine")
    require("gguf", "a GGUF file")
    try:
        digest = sha256_of(path)
    except OSError as error:
        raise EngineError(f"{path}: can't be read ({error.strerror}); expected a GGUF file; check --model") from None
    # Another release may unpack to another layout.
    root = (folder or DEFAULT_FOLDER).expanduser()
    unpacked = root / f"{path.stem}-{digest[:16]}-transformers-{transformers.__version__}"
    if not unpacked.is_dir():
        try:
            with build_folder(unpacked) as temporary:
                _unpack(path, temporary)
        except OSError as error:
            raise EngineError(
                f"{path}: can't be unpacked to {unpacked} ({error}); expected a GGUF file and some room; check --model "
                "and --transformers.gguf_folder"
            ) from None
        except (ImportError, KeyError, NotImplementedError, RuntimeError, ValueError) as error:
            raise EngineError(
                f"{path}: transformers {transformers.__version__} can't read it ({error}); expected a GGUF file of an "
                "architecture that it knows; take the model's safetensors"
            ) from None
    return unpacked, {"gguf": path.name, "sha256": digest}


def _unpack(path: Path, folder: Path) -> None:
    import torch
    from safetensors.torch import save_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # save_pretrained refuses models that came from a GGUF file. save_model writes shared weights once.
    save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]  # a GGUF file doesn't say it, and vLLM and others ask for it
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
