"""Per-query results of an evaluation on disk, used by comparisons, verb statistics and reports."""

import io
import os
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from amp.errors import AmpError
from amp.files import write_atomically
from amp.retrieval.figures import RowKey
from amp.retrieval.split_search import Ranking


@dataclass(frozen=True)
class QueryResults:
    """Per-query results of one row in one direction.

    Attributes:
        queries: Index of each query among the split's images or captions, int32 (Q,).
        images: Image of each query, int32 (Q,).
        candidates: Gallery indices of the pre-selected candidates, best first, int32 (Q, k).
        first_scores: First-stage cosines of the candidates, float32 (Q, k).
        scores: Final scores of the candidates: new score + fusion weight x first-stage cosine, float32 (Q, k).
        first_ranks: 0-based rank of the best positive after the first stage, int32 (Q,).
        ranks: 0-based rank of the best positive after re-ranking, int32 (Q,).
    """

    queries: np.ndarray
    images: np.ndarray
    candidates: np.ndarray
    first_scores: np.ndarray
    scores: np.ndarray
    first_ranks: np.ndarray
    ranks: np.ndarray

    @classmethod
    def of(cls, ranking: Ranking, images: np.ndarray, base: bool = False) -> "QueryResults":
        """Converts a ranking. `images` is the image of each query; `base` marks the ranking of the base model."""
        first = ranking.first
        scores = first.scores if base else ranking.scores + ranking.fusion_weight * first.scores
        integers = (ranking.queries, images, first.candidates, first.ranks, ranking.ranks)
        queries, images, candidates, first_ranks, ranks = (np.asarray(x, dtype=np.int32) for x in integers)
        return cls(
            queries,
            images,
            candidates,
            first.scores.numpy().astype(np.float32),
            scores.numpy().astype(np.float32),
            first_ranks,
            ranks,
        )

    def order(self) -> np.ndarray:
        """Positions of the candidates from best to worst, (Q, k). Ties keep the order of the first stage."""
        return np.argsort(-self.scores, axis=1, kind="stable")


QueryTable = dict[tuple[RowKey, str], QueryResults]
"""Results by row and direction, `i2t` or `t2i`."""


def save_queries(path: str | os.PathLike, table: QueryTable) -> Path:
    """Writes per-query results as one .npz file."""
    arrays = {
        "\t".join((*row, direction, field.name)): getattr(results, field.name)
        for (row, direction), results in table.items()
        for field in fields(QueryResults)
    }
    names = np.array(list(arrays))
    content = io.BytesIO()
    # Row names may contain characters that are unsafe in names of archive members.
    np.savez_compressed(content, names=names, **{f"array_{i}": array for i, array in enumerate(arrays.values())})
    return write_atomically(path, content.getvalue())


def load_queries(path: str | os.PathLike) -> QueryTable:
    """Reads a file written by `save_queries`.

    Raises:
        AmpError: The file is missing or has another format.
    """
    again = "write it again with amp evaluate"
    parts: dict[tuple[RowKey, str], dict[str, np.ndarray]] = {}
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            for i, name in enumerate(file["names"].tolist()):
                *row, direction, field = name.split("\t")
                # Files of earlier versions have the name of the row instead of method, mode and probe.
                parts.setdefault((RowKey(*row), direction), {})[field] = file[f"array_{i}"]
        return {key: QueryResults(**arrays) for key, arrays in parts.items()}
    except OSError as error:
        raise AmpError(f"{path}: can't be read ({error.strerror}), expected per-query results; {again}") from error
    except (ValueError, KeyError, TypeError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        raise AmpError(f"{path}: not per-query results ({error}); {again}") from error
