"""An evaluation in progress: finished rows with their intervals, and the rows that are still missing."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from amp.evaluate.bootstrap import interval, resampled_recalls
from amp.evaluate.per_query import QueryResults, QueryTable, save_queries
from amp.evaluate.results import ResultFile
from amp.evaluate.verbs import by_verb, save_verbs
from amp.knowledge.schema import Knowledge
from amp.retrieval.figures import BASE, RetrievalRow, RowKey
from amp.retrieval.metrics import KS
from amp.retrieval.split_search import Ranking, Rankings, SplitSearch

SUFFIXES = (".json", ".csv", ".npz", ".verbs.csv")


class Evaluation:
    """Collects the figures, intervals and per-query results of rows, and writes them to files.

    Args:
        protocol: Protocol of the result file. While rows are missing, the file lists them as `missing_rows`.
        search: Search of the split. Its base-model ranking becomes the first row.
        rows: Keys of the other rows, in order.
        samples: Number of bootstrap samples; 0 computes no intervals.
        seed: Random seed of the bootstrap.
    """

    def __init__(self, protocol: dict, search: SplitSearch, rows: Sequence[RowKey], samples: int, seed: int):
        self.result, self.planned = ResultFile(protocol), [BASE, *rows]
        self.queries: QueryTable = {}
        self.fold, self.samples, self.seed = search.fold.numpy(), samples, seed
        self.images = {direction: found.query_image.numpy() for direction, found in search.positives.items()}
        base = search.base()
        self._add(BASE, base.i2t[""], base.t2i)

    @property
    def missing(self) -> list[RowKey]:
        """Keys of the rows that have not been added yet."""
        done = {row.key for row in self.result.rows}
        return [key for key in self.planned if key not in done]

    def add(self, method: str, rankings: Rankings, probe: str = "") -> None:
        """Adds one row per mode of a model's rankings."""
        for mode, i2t in rankings.i2t.items():
            self._add(RowKey(method, mode, probe), i2t, rankings.t2i)

    def _add(self, key: RowKey, i2t: Ranking, t2i: Ranking) -> None:
        rankings = {"i2t": i2t, "t2i": t2i}
        for direction, ranking in rankings.items():
            self.queries[key, direction] = QueryResults.of(ranking, self.images[direction], base=key == BASE)
        results, rsum_interval = [i2t.result, t2i.result], None
        if self.samples:
            ranks, images = [r.ranks.numpy() for r in rankings.values()], [self.images[d] for d in rankings]
            recalls = resampled_recalls(ranks, images, self.samples, self.fold, self.seed)
            for index, result in enumerate(results):
                bounds = {k: interval(recalls[:, index, column]) for column, k in enumerate(KS)}
                results[index] = replace(result, interval=bounds)
            rsum_interval = interval(recalls.sum(axis=(1, 2)))
        self.result.rows.append(RetrievalRow(key, results[0], results[1], rsum_interval))

    def save(self, out: Path) -> None:
        """Writes the rows so far as JSON, CSV and per-query results."""
        self.result.protocol.pop("missing_rows", None)
        if self.missing:
            self.result.protocol["missing_rows"] = list(map(str, self.missing))
        save_queries(out.with_suffix(".npz"), self.queries)
        self.result.save_csv(out.with_suffix(".csv"))
        self.result.save_json(out)

    def save_verbs(self, out: Path, knowledge: Sequence[Knowledge]) -> None:
        """Writes the accuracy by action verb of every row except the base model's."""
        keys = [row.key for row in self.result.rows[1:]]
        save_verbs(out.with_suffix(".verbs.csv"), {key: by_verb(self.queries, key, knowledge) for key in keys})
