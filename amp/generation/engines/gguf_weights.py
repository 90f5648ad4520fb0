"""Unpacks GGUF files once and stores them as safetensors, because transformers needs half a minute for a small one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from amp.errors import require
from amp.files import sha256_of
from amp.folders import build_folder
from amp.generation.engines.base import EngineError

DEFAULT_FOLDER = Path("~/.cache/open-clip-amp/gguf")
_LAYOUT = 3  # of the folder; increase it if `_unpack` writes something else


def unpack(path: Path, folder: Path | None = None) -> tuple[Path, dict[str, str]]:
    """Converts a GGUF file to a model folder that transformers loads in a second.

    Args:
        path: The GGUF file. Its weights are unpacked to bfloat16 if that is exact, otherwise to float32.
        folder: Where unpacked models are stored; `~/.cache/open-clip-amp/gguf` by default.

    Returns:
        The model folder, and the file's name and SHA-256, which identify the weights.

    Raises:
        EngineError: The file is not a GGUF file that transformers can read, or the folder can't be written.
    """
    transformers = require("transformers", "the transformers engine")
    require("gguf", "a GGUF file")
    try:
        digest = sha256_of(path)
    except OSError as error:
        raise EngineError(f"{path}: can't be read ({error.strerror}); expected a GGUF file; check --model") from None
    # Another release of transformers may use another layout.
    root = (folder or DEFAULT_FOLDER).expanduser()
    unpacked = root / f"{path.stem}-{digest[:16]}-transformers-{transformers.__version__}-{_LAYOUT}"
    if not unpacked.is_dir():
        try:
            with build_folder(unpacked) as temporary:
                _unpack(path, temporary)
        except OSError as error:
            raise EngineError(
                f"{path}: can't be unpacked to {unpacked} ({error}); expected a GGUF file and free disk space; check "
                "--model and --transformers.gguf_folder"
            ) from None
        except (ImportError, KeyError, NotImplementedError, RuntimeError, ValueError) as error:
            raise EngineError(
                f"{path}: transformers {transformers.__version__} can't read it ({error}); expected a GGUF file of a "
                "supported architecture; use the model's safetensors"
            ) from None
    return unpacked, {"gguf": path.name, "sha256": digest}


def _unpack(path: Path, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # Not `save_pretrained`, which refuses models loaded from a GGUF file. Tied weights are stored once, under their
    # first name, that of the input embedding: vLLM reads it under no other.
    weights = {tensor.data_ptr(): (name, tensor) for name, tensor in reversed(model.state_dict().items())}
    stored = {name: tensor.contiguous() for name, tensor in weights.values()}
    short = {name: tensor.bfloat16() for name, tensor in stored.items()}
    if all(torch.equal(short[name].float(), tensor) for name, tensor in stored.items()):
        stored, model.config.dtype = short, torch.bfloat16
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.__dict__.pop("quantization_config", None)  # the weights are unpacked; vLLM would refuse the folder
    model.config.architectures = [type(model).__name__]  # not in the GGUF file, but vLLM and others need it
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    load_tokenizer(path).save_pretrained(folder)


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a GGUF file. Texts begin with its first token if the file says so."""
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    field = GGUFReader(path).get_field("tokenizer.ggml.add_bos_token")
    # transformers before 5.20 drops this for some families. Gemma repeats itself without its first token.
    if field is not None and field.parts[-1][0] and tokenizer("a")["input_ids"][0] != tokenizer.bos_token_id:
        tokenizer.add_bos_token = True
    return tokenizer
