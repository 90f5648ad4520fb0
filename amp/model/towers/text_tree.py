"""Texts of one forward pass as a tree: a causal text tower computes a prefix that several texts share only once."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class TextTree:
    """N distinct prefixes of B texts. A node is the last token of a prefix, and attends to its ancestors and itself.

    P tokens that were computed before ("known") are no nodes, but texts that start with them attend to them.

    Attributes:
        ids: Token id of each node (N,).
        positions: Position of each node in its texts (N,).
        attends: Whether a node (row) attends to a known token or a node (column), bool (N, P + N).
        ends: Node of each text's end-of-text token (B,).
    """

    ids: torch.Tensor
    positions: torch.Tensor
    attends: torch.Tensor
    ends: torch.Tensor

    @classmethod
    def of(cls, ids: torch.Tensor, ends: torch.Tensor, known: torch.Tensor) -> "TextTree":
        """The tree of token ids (B, T), which end at the positions `ends` (B,), after the `known` tokens (P,).

        No text may end at a known token.
        """
        skipped = len(known)
        ids = torch.cat([F.pad(known, (0, ids.shape[1] - skipped))[None], ids])
        ends = torch.cat([ends.new_tensor([skipped - 1]), ends])
        texts, places = torch.arange(len(ids)), torch.arange(ids.shape[1])
        inside = places <= ends[:, None]
        same_prefix = (ids[:, None] == ids).cummin(dim=2).values & inside
        first = same_prefix.int().argmax(dim=1)  # (B, T): the first text with the same prefix
        new = (first == texts[:, None]) & inside
        node = torch.zeros_like(ids)
        node[new] = torch.arange(int(new.sum()))
        node = node[first, places]
        attends = torch.zeros(int(new.sum()), int(new.sum()), dtype=torch.bool)
        earlier = torch.ones(len(places), len(places), dtype=torch.bool).tril()
        for path, end in zip(node, (ends + 1).tolist(), strict=True):
            attends[path[:end, None], path[:end]] |= earlier[:end, :end]
        nodes, positions = ids[new], places.expand_as(ids)[new]
        return cls(nodes[skipped:], positions[skipped:], attends[skipped:], node[texts, ends][1:] - skipped)


def split_texts(ids: torch.Tensor, ends: torch.Tensor, nodes: int) -> Iterator[torch.Tensor]:
    """Splits B texts, sorted by their tokens, into parts whose trees have at most `nodes` nodes or hold one text.

    Args:
        ids, ends: See `TextTree.of`.
        nodes: Size of a tree. Larger ones share more prefixes, but their attention costs more.

    Yields:
        Indices of the texts of each part.
    """
    rows, lengths = ids.tolist(), (ends + 1).tolist()
    part: list[int] = []
    previous: list[int] = []
    used = 0
    for text in sorted(range(len(rows)), key=rows.__getitem__):
        row = rows[text][: lengths[text]]
        equal = (a == b for a, b in zip(row, previous, strict=False))
        shared = sum(takewhile(bool, equal))
        if part and used + len(row) - shared > nodes:
            yield torch.tensor(part)
            part, used, shared = [], 0, 0
        part.append(text)
        used, previous = used + len(row) - shared, row
    yield torch.tensor(part)
