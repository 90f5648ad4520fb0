"""Writes an evaluation as one self-contained HTML page: tables, plots, verbs, photos and attention maps."""

import base64
import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from amp.data.split import ShardSplit
from amp.data.split_captions import SplitCaptions
from amp.errors import Problems
from amp.evaluate.per_query import QueryTable
from amp.evaluate.results import ResultFile
from amp.evaluate.verbs import by_verb, verbs_of
from amp.files import write_atomically
from amp.knowledge.text import select
from amp.model.clip import ActionAwareCLIP
from amp.report.attention import attention_maps, model_view
from amp.report.choice import OUTCOMES, choose_rows, counts, outcomes
from amp.retrieval.figures import RowKey
from amp.retrieval.metrics import KS

BASE = "base CLIP"
THUMB = 224
SHOWN = 3


@dataclass(frozen=True)
class ReportInput:
    """Content of a page.

    Attributes:
        result: Rows and protocol of the evaluation.
        queries: Results per query.
        row: Name of the row that is compared with the base model.
        split, captions: Split that was evaluated, and its captions.
        model: Model whose attention maps are shown; None shows no maps.
        preprocess: Image transform of the model; None without a model.
        preprocess_cfg: How photos are resized, as open_clip stores it (`visual.preprocess_cfg`).
        plots: SVG plots by title, in order.
        title: Title of the page.
    """

    result: ResultFile
    queries: QueryTable
    row: RowKey
    split: ShardSplit
    captions: SplitCaptions
    model: ActionAwareCLIP | None
    preprocess: Callable[[Image.Image], torch.Tensor] | None
    preprocess_cfg: dict
    plots: dict[str, str]
    title: str


def write_report(
    path: str | os.PathLike, given: ReportInput, captions: int = 80, images: int = 30, progress=None
) -> tuple[Path, list[str]]:
    """Writes the page.

    Args:
        path: HTML file.
        given: Content of the page.
        captions, images: Number of caption and image queries in the gallery.
        progress: Called as progress(done, total).

    Returns:
        The file, and one message for each query that was left out because one of its photos can't be read.
    """
    page, problems = _Page(given), Problems()
    chosen = [("t2i", row) for row in choose_rows(given.queries[given.row, "t2i"], captions)]
    chosen += [("i2t", row) for row in choose_rows(given.queries[given.row, "i2t"], images)]
    cards = []
    for done, (direction, row) in enumerate(chosen, start=1):
        with problems.collect():
            cards.append(page.card(direction, row))
        if progress is not None:
            progress(done, len(chosen))
    verbs = by_verb(given.queries, given.row, given.captions.knowledge)
    content = {
        "title": given.title,
        "row": str(given.row),
        "base": BASE,
        "table": table_of(given.result),
        "ks": list(KS),
        "protocol": {key: value for key, value in given.result.protocol.items() if value not in (None, "")},
        "plots": [{"title": title, "svg": svg} for title, svg in given.plots.items()],
        "verbs": [asdict(verb) for verb in verbs],
        "cards": cards,
        "photos": page.photos,
        "counts": {d: counts(given.queries[given.row, d]) for d in ("t2i", "i2t")},
    }
    template = resources.files("amp.report").joinpath("report.html").read_text(encoding="utf-8")
    # "<" is escaped, so no text can end the script element that contains the data.
    data = json.dumps(content, ensure_ascii=False).replace("<", "\\u003c").replace("\u2028", "\\u2028")
    page_text = template.replace("__DATA__", data, 1)
    return write_atomically(path, page_text.encode("utf-8", "replace")), problems.found


def table_of(result: ResultFile) -> list[dict]:
    """Returns the rows of the table, followed by ceiling and chance of the first row's candidates."""
    rows = []
    for row in result.rows:
        values = [*row.i2t.recall.values(), *row.t2i.recall.values(), row.rsum]
        bounds = None
        if row.i2t.interval and row.t2i.interval and row.rsum_interval:
            bounds = [*row.i2t.interval.values(), *row.t2i.interval.values(), row.rsum_interval]
        rows.append({"name": row.name, "values": values, "bounds": bounds, "reference": False})
    first = result.rows[0]
    for name in ("ceiling", "chance"):
        values = [*getattr(first.i2t, name).values(), *getattr(first.t2i, name).values()]
        rows.append(
            {
                "name": f"{name} of the top {first.t2i.top_k}",
                "values": [*values, sum(values)],
                "bounds": None,
                "reference": True,
            }
        )
    return rows


class _Page:
    """The cards of a page and the photos that they share."""

    def __init__(self, given: ReportInput):
        self.given = given
        self.photos: dict[str, str] = {}
        self._early: dict[int, torch.Tensor] = {}
        self._fit = model_view(given.preprocess_cfg, THUMB)

    def card(self, direction: str, row: int) -> dict:
        """Returns one query with the first results of the base model and of the compared row."""
        given = self.given
        results = given.queries[given.row, direction]
        query, image = int(results.queries[row]), int(results.images[row])
        base = list(zip(results.candidates[row], results.first_scores[row], strict=True))[:SHOWN]
        order = results.order()[row][:SHOWN]
        new = [(results.candidates[row][i], results.scores[row][i]) for i in order]
        card = {
            "direction": direction,
            "outcome": OUTCOMES[int(outcomes(results)[row])],
            "query": query,
            "ranks": [int(results.first_ranks[row]) + 1, int(results.ranks[row]) + 1],
        }
        if direction == "t2i":
            hits = [[self._image_hit(int(i), float(s), image) for i, s in side] for side in (base, new)]
            looked_at = list(dict.fromkeys([image, int(new[0][0]), int(base[0][0])]))
            return card | self._caption(query, looked_at) | {"image": self._photo(image), "hits": hits}
        hits = [[self._caption_hit(int(c), float(s), image, side is new) for c, s in side] for side in (base, new)]
        verbs = sorted({verb for caption, _ in new for verb in verbs_of(given.captions.knowledge[int(caption)])})
        return card | {"image": self._photo(image), "hits": hits, "verbs": verbs, "triplets": []}

    def _caption(self, caption: int, images: Sequence[int]) -> dict:
        given = self.given
        knowledge = given.captions.knowledge[caption]
        kept = select(knowledge, given.model.config.max_triplets if given.model else len(knowledge.triplets))
        maps = [self._maps(image, caption) for image in images]
        triplets = [
            {
                "subject": t.subject,
                "action": t.action,
                "object": t.object,
                "kind": t.kind,
                "state": state,
                "maps": [
                    {"photo": str(image), **{name: x[number] for name, x in found.items()}}
                    for image, found in zip(images, maps, strict=True)
                    if found
                ],
            }
            for number, (t, state) in enumerate(kept)
        ]
        return {"text": given.captions.texts[caption], "triplets": triplets, "verbs": verbs_of(knowledge)}

    def _maps(self, image: int, caption: int) -> dict[str, list[str]]:
        """Attention maps of each triplet as small grey PNG images."""
        model = self.given.model
        if model is None or self.given.preprocess is None or not model.interaction.conditioned:
            return {}
        if image not in self._early:
            pixels = self.given.preprocess(self.given.split.image(image))[None].to(model.logit_scale.device)
            with torch.no_grad():
                self._early[image] = model.tower.early(pixels)
        batch = model.prepare_knowledge([self.given.captions.knowledge[caption]])
        found = attention_maps(model, self._early[image], batch)
        return {name: [_grey(x) for x in maps.cpu().numpy()] for name, maps in found.items()}

    def _photo(self, image: int) -> str:
        name = str(image)
        if name not in self.photos:
            buffer = io.BytesIO()
            self._fit(self.given.split.image(image)).save(buffer, "JPEG", quality=80)
            self.photos[name] = _data_url("jpeg", buffer)
        return name

    def _image_hit(self, image: int, score: float, answer: int) -> dict:
        return {"photo": self._photo(image), "score": score, "right": image == answer}

    def _caption_hit(self, caption: int, score: float, answer: int, with_knowledge: bool) -> dict:
        hit = {
            "text": self.given.captions.texts[caption],
            "score": score,
            "right": int(self.given.captions.image[caption]) == answer,
        }
        return hit | ({"triplets": self._caption(caption, [answer])["triplets"]} if with_knowledge else {})


def _grey(values: np.ndarray) -> str:
    """Converts a map to a grey image with one pixel per patch, scaled from its lowest to its highest value."""
    spread = float(np.ptp(values)) or 1.0
    buffer = io.BytesIO()
    Image.fromarray(np.uint8(255 * (values - values.min()) / spread)).save(buffer, "PNG")
    return _data_url("png", buffer)


def _data_url(kind: str, buffer: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
