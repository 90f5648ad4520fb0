"""An evaluation run: one split, the base model and any number of adapters, one table."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator

from amp.cores import use_cores
from amp.data.prepare import knowledge_collator, prepare_images, prepare_texts
from amp.data.split import ShardSplit
from amp.errors import AmpError
from amp.factory import create_model_and_transforms
from amp.retrieval.adapters import adapted, named_adapter
from amp.retrieval.baseline import baseline
from amp.retrieval.bootstrap import interval, resampled_recalls
from amp.retrieval.evaluate import Ranking, Retrieval, RetrievalSettings, SplitCaptions
from amp.retrieval.metrics import KS
from amp.retrieval.per_query import QueryResults, QueryTable, save_queries
from amp.retrieval.picture import draw_retrievals
from amp.retrieval.probes import Probe, enriched_text, probe
from amp.retrieval.protocol import protocol
from amp.retrieval.results import ResultFile, RetrievalRow
from amp.retrieval.verbs import by_verb, save_verbs
from amp.terminal import PlainConsole, Terminal
from amp.train.config import TrainConfig
from amp.train.launch import make_accelerator


class Evaluation:
    """Rows of an evaluation as they come: figures with intervals, and results a query.

    Args:
        protocol: Of the result file.
        fold: Fold of each image.
        samples: Bootstrap samples; 0 computes no interval.
        seed: Of the bootstrap.
    """

    def __init__(self, protocol: dict, fold: torch.Tensor, samples: int, seed: int):
        self.result = ResultFile(protocol)
        self.queries: QueryTable = {}
        self.fold, self.samples, self.seed = fold.numpy(), samples, seed

    def add(self, name: str, i2t: Ranking, t2i: Ranking, images: dict[str, torch.Tensor], base: bool = False) -> None:
        """Adds a row; `images` holds the image of each query by direction."""
        rankings = {"i2t": i2t, "t2i": t2i}
        for direction, ranking in rankings.items():
            self.queries[name, direction] = QueryResults.of(ranking, images[direction].numpy(), base)
        results, rsum_interval = [i2t.result, t2i.result], None
        if self.samples:
            recalls = resampled_recalls(
                [r.ranks.numpy() for r in rankings.values()], [images[d].numpy() for d in rankings], self.samples,
                self.fold, self.seed,
            )  # fmt: skip
            for index, result in enumerate(results):
                bounds = {k: interval(recalls[:, index, column]) for column, k in enumerate(KS)}
                results[index] = replace(result, interval=bounds)
            rsum_interval = interval(recalls.sum(axis=(1, 2)))
        self.result.rows.append(RetrievalRow(name, results[0], results[1], rsum_interval))

    def save(self, out: Path) -> None:
        """Writes JSON, CSV, and results a query beside them."""
        save_queries(out.with_suffix(".npz"), self.queries)
        self.result.save_csv(out.with_suffix(".csv"))
        self.result.save_json(out)


@dataclass
class Run:
    """What the parts of an evaluation share."""

    config: TrainConfig
    split: ShardSplit
    captions: SplitCaptions
    search: RetrievalSettings
    accelerator: Accelerator
    terminal: Terminal
    precision: str
    bootstrap: int

    def begin(self, retrieval: Retrieval, described: dict, adapters: dict[str, str]) -> Evaluation:
        """An evaluation with the base model's row."""
        found = protocol(self.config, self.split, self.captions, self.search, self.precision, self.bootstrap, described,
                         adapters)  # fmt: skip
        evaluation = Evaluation(found, retrieval.fold, self.bootstrap, self.config.seed)
        base = retrieval.base()
        with self.terminal.progress("figures of base CLIP"):
            evaluation.add("base CLIP", base["i2t"], base["t2i"], images_of(retrieval), base=True)
        return evaluation

    def add_rows(self, evaluation: Evaluation, retrieval: Retrieval, name: str, rankings: dict[str, Ranking]) -> None:
        """Adds the rows of one model's rankings."""
        with self.terminal.progress(f"figures of {name}"):
            for row, pair in retrieval.methods(name, rankings).items():
                evaluation.add(row, *pair, images_of(retrieval))


def images_of(retrieval: Retrieval) -> dict[str, torch.Tensor]:
    """The image of each query by direction."""
    return {direction: positives.query_image for direction, positives in retrieval.positives.items()}


def _partial(out: Path) -> Path:
    return out.with_suffix(".partial")


def _with_models(run: Run, named: list[tuple[str, str]], probes: Sequence[Probe], text_only: bool, out: Path,
                 ) -> tuple[Evaluation, dict[str, Ranking]]:  # fmt: skip
    """Rows of base model, text-only control, adapters and probes, and the last adapter's rankings."""
    config, accelerator, terminal, captions = run.config, run.accelerator, run.terminal, run.captions
    with terminal.progress(f"loading {config.model.name}"):
        base, _, preprocess = create_model_and_transforms(
            config.model.name, config.model.pretrained, precision=config.model.precision, device=accelerator.device,
            prompt_config=config.prompt, image_resize_mode=config.model.resize_mode,
        )  # fmt: skip
        models = {name: adapted(base, config.model.name, path) for name, path in named} or {"base": base}
        described = {"weights_sha256": base.base_hash, "quick_gelu": base.backbone.quick_gelu,
                     "image_size": list(base.backbone.visual.image_size)}  # fmt: skip
    evaluation: Evaluation | None = None
    rankings: dict[str, Ranking] = {}
    for name, model in models.items():
        collate = knowledge_collator(model, config.data.cache, config.data.cache_dtype)
        k = model.config.max_triplets
        prepare_texts(accelerator, terminal, collate.store, model, captions.all_texts(k, model.config.knowledge))
        frozen = prepare_images(accelerator, terminal, run.split, model, preprocess, config.data.cache,
                                config.data.cache_dtype, config.data.batch_size, config.data.workers)  # fmt: skip
        with terminal.progress("searching with the base model"):
            retrieval = Retrieval.stored(captions, frozen, collate, run.search, accelerator.device)
        if evaluation is None:
            evaluation = run.begin(retrieval, described, dict(named))
            if text_only:
                # The first model need not read states.
                states = knowledge_collator(model, config.data.cache, config.data.cache_dtype, "states")
                prepare_texts(accelerator, terminal, states.store, model, captions.all_texts(k, "states"))
                text = enriched_text(retrieval.text, states(captions.knowledge))
                run.add_rows(evaluation, retrieval, "captions with states", retrieval.rank_text(text))
        if not named:
            break
        model.eval()

        def ranked(searched: Retrieval, title: str, model=model) -> dict[str, Ranking]:
            with terminal.progress(title, "pairs") as report:
                return searched.rank(model, accelerator.autocast, lambda _, done, total: report(done, total),
                                     _partial(out), run.precision)  # fmt: skip

        rankings = ranked(retrieval, f"re-ranking with {name}")
        run.add_rows(evaluation, retrieval, name, rankings)
        for kind in probes if model.knowledge_aware else ():
            spoilt = probe(retrieval, kind, model, preprocess, config.seed)
            found = ranked(spoilt, f"probe {kind} of {name}")
            run.add_rows(evaluation, retrieval, f"{name}, {kind}", found)
        if accelerator.is_main_process:  # after each adapter, so that a stop loses one at most
            evaluation.save(out)
    assert evaluation is not None  # the first model has begun it
    return evaluation, rankings


def evaluate(config: TrainConfig, split_name: str, adapters: list[str], search: RetrievalSettings, out: Path,
             gallery: str | None = None, probes: Sequence[Probe] = (), text_only: bool = False, bootstrap: int = 1000,
             ) -> ResultFile:  # fmt: skip
    """Evaluates the base model and adapters, prints the table and writes its files.

    Scores of pairs are kept in OUT.partial while it runs: the same call goes on with them, on any number of processes.

    Args:
        config: Of it `model`, `data` and `mixed_precision` are read.
        split_name: Split of the shards.
        adapters: ``NAME=FILE`` each.
        search: How the split is searched.
        out: JSON file; the .csv file, the .npz file with results a query and the .verbs.csv file take its name.
        gallery: PNG file with retrievals of the last adapter.
        probes: Each adds rows of every knowledge-aware adapter with one input spoilt.
        text_only: Add the row of the text-only control: captions with their states, without any action-aware image.
        bootstrap: Samples of the confidence intervals; 0 computes none.

    Raises:
        AmpError: Wrong input, such as an adapter of another base model.
    """
    named = [named_adapter(text) for text in adapters]
    if gallery is not None and not named:
        raise AmpError("gallery needs an adapter to compare with the base model; add --adapters NAME=FILE")
    accelerator = make_accelerator(config, training=False)
    terminal = Terminal(accelerator.is_main_process)
    terminal.say(str(use_cores(config.data.workers, accelerator.device.type == "cuda")))
    split = ShardSplit(config.data.shards, split_name)
    with terminal.progress("reading captions"):
        captions = SplitCaptions.read(split, config.data.kinds, search.captions_per_image)
    precision = f"{config.model.precision}, autocast {accelerator.mixed_precision}"
    run = Run(config, split, captions, search, accelerator, terminal, precision, bootstrap)
    if named or text_only:
        evaluation, rankings = _with_models(run, named, probes, text_only, out)
    else:
        retrieval, described = baseline(config.model, config.data, split, captions, search, accelerator, terminal)
        evaluation = run.begin(retrieval, described, {})
    accelerator.wait_for_everyone()  # no process reads partial scores any more
    if accelerator.is_main_process:
        evaluation.save(out)
        if named:
            rows = [row.name for row in evaluation.result.rows[1:]]
            verbs = {row: by_verb(evaluation.queries, row, captions.knowledge) for row in rows}
            save_verbs(out.with_suffix(".verbs.csv"), verbs)
        shutil.rmtree(_partial(out), ignore_errors=True)
        evaluation.result.print_table(PlainConsole())
        if gallery is not None:
            draw_retrievals(Path(gallery), split, captions, rankings)
    accelerator.end_training()
    return evaluation.result
