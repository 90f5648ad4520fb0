"""Where a local or hub model is, and what identifies its weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

from amp.files import sha256_of
from amp.generation.engines.base import EngineError


def find_model(model: str, revision: str | None, gguf_folder: str | None) -> tuple[str, dict[str, str] | None]:
    """Finds a hub model, a folder or a GGUF file, which is unpacked first.

    Args:
        model: Hub name, folder or `.gguf` file.
        revision: Revision on the hub.
        gguf_folder: Folder for unpacked GGUF files; None takes the default.

    Returns:
        The hub name or folder to load, and the hashes that identify local weights; None for a hub model.

    Raises:
        EngineError: There is no such model, or a revision is given for a folder.
    """
    path = Path(model).expanduser()
    if path.suffix.lower() == ".gguf":
        from amp.generation.engines.gguf_weights import unpack

        folder, origin = unpack(path, Path(gguf_folder) if gguf_folder else None)
        return str(folder), origin
    if not path.is_dir():
        if path.exists() or model.startswith(("/", ".", "~")):
            raise EngineError(f"{model}: no such model folder; expected a folder or a .gguf file; check --model")
        return model, None
    if revision is not None:
        raise EngineError(f"{model}: is a folder, which has no revision; remove the revision")
    digest = hashlib.sha256()
    weights = sorted((*path.glob("*.safetensors"), *path.glob("*.bin")))
    for file in weights:
        digest.update(f"{file.name} {sha256_of(file)}\n".encode())
    if not weights:
        raise EngineError(f"{model}: contains no weights; expected *.safetensors or *.bin; check --model")
    return str(path), {"sha256": digest.hexdigest()}
