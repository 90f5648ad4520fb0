"""Attaches knowledge to captions for the shards, and describes it for the manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from amp.data.captions.base import CaptionedImage
from amp.data.captions.knowledge_file import KnowledgeReport, attach_knowledge
from amp.data.conversion.sources import knowledge_files, load_provenance, source_file
from amp.errors import AmpError


def attach(
    images: list[CaptionedImage], knowledge: str | None, knowledge_provenance: str | None, images_root: Path | None
) -> tuple[KnowledgeReport | None, dict[str, Any] | None]:
    """Attaches knowledge to the captions.

    Args:
        images: The images with their captions.
        knowledge: Knowledge file, or the folder that contains it; None for no knowledge.
        knowledge_provenance: File that describes how the knowledge was made.
        images_root: The images folder, for absolute paths in the knowledge file.

    Returns:
        The counts, and the manifest's entry; both None without knowledge.

    Raises:
        AmpError: A file can't be used.
    """
    if knowledge is None:
        if knowledge_provenance is not None:
            raise AmpError("knowledge_provenance is given without knowledge; give both or neither")
        return None, None
    file, provenance = knowledge_files(knowledge, knowledge_provenance)
    report = attach_knowledge(images, file, images_root)
    return report, {
        **source_file(file),
        "records": report.records,
        "captions_with_knowledge": report.attached,
        "records_without_caption": report.unused,
        "provenance": load_provenance(provenance),
    }
