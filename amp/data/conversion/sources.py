"""Describes the source files of shards for the manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from amp.data.captions.base import DATASET_PREFIX
from amp.errors import AmpError
from amp.files import sha256_of
from amp.json_text import parse_json
from amp.knowledge.schema import KNOWLEDGE_NAME, PROVENANCE_NAME


def source_file(path: str | Path) -> dict[str, str]:
    """Name and SHA-256 of a file; only the name of a dataset, whose reader computes a hash.

    Raises:
        AmpError: The file can't be read.
    """
    if str(path).startswith(DATASET_PREFIX):
        return {"file": str(path)}
    try:
        return {"file": Path(path).name, "sha256": sha256_of(path)}
    except OSError as error:
        raise AmpError(f"{path}: can't be read ({error.strerror}); expected a file; check the path") from None


def knowledge_files(knowledge: str, provenance: str | None) -> tuple[str, str | None]:
    """Paths of the knowledge file and the provenance file; `knowledge` may be the folder that contains both."""
    folder = Path(knowledge)
    if not folder.is_dir():
        return knowledge, provenance
    return str(folder / KNOWLEDGE_NAME), str(folder / PROVENANCE_NAME) if provenance is None else provenance


def load_provenance(path: str | None) -> Any:
    """Content of a provenance file; None if `path` is None.

    Raises:
        AmpError: The file can't be read, or isn't JSON.
    """
    if path is None:
        return None
    try:
        return parse_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise AmpError(f"{path}: can't be read ({error.strerror}); expected a JSON file; check the path") from None
    except ValueError as error:
        raise AmpError(
            f"{path}: not valid JSON ({error}); expected the knowledge's provenance; correct the file"
        ) from None
