"""An evaluation run: one split, the base model and any number of adapters, one table."""

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator

from amp.cores import use_cores
from amp.data.prepare import knowledge_collator, prepare_images, prepare_texts
from amp.data.split import ShardSplit
from amp.data.split_captions import SplitCaptions
from amp.errors import AmpError, Problems
from amp.evaluate.adapters import load_adapters, named_adapters
from amp.evaluate.baseline import baseline
from amp.evaluate.bootstrap import interval, resampled_recalls
from amp.evaluate.per_query import QueryResults, QueryTable, save_queries
from amp.evaluate.probes import Probe, enriched_text, probe, shuffled
from amp.evaluate.protocol import protocol
from amp.evaluate.results import ResultFile
from amp.evaluate.verbs import by_verb, save_verbs
from amp.files import check_writable
from amp.model.clip import ActionAwareCLIP
from amp.model.factory import create_model_and_transforms
from amp.report.picture import draw_retrievals
from amp.retrieval.figures import BASE, RetrievalRow, RowKey
from amp.retrieval.first_stage import i2t_positives
from amp.retrieval.metrics import KS
from amp.retrieval.settings import RetrievalSettings
from amp.retrieval.split_search import Ranking, Rankings, SplitSearch
from amp.terminal import PlainConsole, Terminal
from amp.train.config import TrainConfig
from amp.train.launch import make_accelerator, precision_problems, rank_of_launcher

TEXT_ONLY = RowKey("captions with states")


class Evaluation:
    """Rows of an evaluation as they come: figures with intervals, and results a query.

    Args:
        protocol: Of the result file. While rows are missing, the file lists them as ``missing_rows``.
        rows: Names of all rows, in order.
        fold: Fold of each image.
        samples: Bootstrap samples; 0 computes no interval.
        seed: Of the bootstrap.
    """

    def __init__(self, protocol: dict, rows: Sequence[RowKey], fold: torch.Tensor, samples: int, seed: int):
        self.result, self.planned = ResultFile(protocol), list(rows)
        self.queries: QueryTable = {}
        self.missing = self.planned
        self.fold, self.samples, self.seed = fold.numpy(), samples, seed

    def add(self, key: RowKey, i2t: Ranking, t2i: Ranking, images: dict[str, torch.Tensor], base: bool = False) -> None:
        """Adds a row; `images` holds the image of each query by direction."""
        rankings = {"i2t": i2t, "t2i": t2i}
        for direction, ranking in rankings.items():
            self.queries[str(key), direction] = QueryResults.of(ranking, images[direction].numpy(), base)
        results, rsum_interval = [i2t.result, t2i.result], None
        if self.samples:
            recalls = resampled_recalls(
                [r.ranks.numpy() for r in rankings.values()],
                [images[d].numpy() for d in rankings],
                self.samples,
                self.fold,
                self.seed,
            )
            for index, result in enumerate(results):
                bounds = {k: interval(recalls[:, index, column]) for column, k in enumerate(KS)}
                results[index] = replace(result, interval=bounds)
            rsum_interval = interval(recalls.sum(axis=(1, 2)))
        self.result.rows.append(RetrievalRow(key, results[0], results[1], rsum_interval))

    def save(self, out: Path) -> None:
        """Writes JSON, CSV, and results per query, of the rows so far."""
        done = {row.key for row in self.result.rows}
        self.result.protocol.pop("missing_rows", None)
        self.missing = [key for key in self.planned if key not in done]
        if self.missing:
            self.result.protocol["missing_rows"] = list(map(str, self.missing))
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
    out: Path

    def begin(
        self, retrieval: SplitSearch, described: dict, adapters: dict[str, str], rows: Sequence[RowKey] = ()
    ) -> Evaluation:
        """An evaluation with the base model's row, and `rows` to come."""
        found = protocol(
            self.config, self.split, self.captions, self.search, self.precision, self.bootstrap, described, adapters
        )
        evaluation = Evaluation(found, [BASE, *rows], retrieval.fold, self.bootstrap, self.config.seed)
        base = retrieval.base()
        with self.terminal.progress("figures of base CLIP"):
            evaluation.add(BASE, base.i2t[""], base.t2i, images_of(retrieval), base=True)
            self.save(evaluation)
        return evaluation

    def add_rows(
        self, evaluation: Evaluation, retrieval: SplitSearch, method: str, rankings: Rankings, probe: str = ""
    ) -> None:
        """Adds the rows of one model's rankings."""
        with self.terminal.progress(f"figures of {RowKey(method, probe=probe)}"):
            for mode, i2t in rankings.i2t.items():
                evaluation.add(RowKey(method, mode, probe), i2t, rankings.t2i, images_of(retrieval))
            self.save(evaluation)

    def save(self, evaluation: Evaluation) -> None:
        """Writes the rows so far, so that a stop loses only those being computed."""
        if self.accelerator.is_main_process:
            evaluation.save(self.out)


def images_of(retrieval: SplitSearch) -> dict[str, torch.Tensor]:
    """The image of each query by direction."""
    return {direction: positives.query_image for direction, positives in retrieval.positives.items()}


def _partial(out: Path) -> Path:
    return out.with_suffix(".partial")


def planned_rows(
    models: dict[str, ActionAwareCLIP], probes: Sequence[Probe], text_only: bool, search: RetrievalSettings
) -> list[RowKey]:
    """Keys of the rows after the base model's.

    Raises:
        AmpError: Two would have one name.
    """
    rows = [TEXT_ONLY] if text_only else []
    for name, model in models.items():
        conditioned = model.interaction.conditioned
        modes, inputs = (search.i2t, ("", *probes)) if conditioned else ([""], [""])
        rows += [RowKey(name, mode, kind) for kind in inputs for mode in modes]
    twice = next((row for row, count in Counter(map(str, [BASE, *rows])).items() if count > 1), None)
    if twice is not None:
        raise AmpError(
            f"the row {twice!r} would be there twice, expected different rows; look for an adapter's name, a probe or "
            "an i2t that is given twice"
        )
    return rows


def _with_models(
    run: Run,
    named: dict[str, str],
    probes: Sequence[Probe],
    text_only: bool,
) -> tuple[Evaluation, Rankings | None]:
    """Rows of base model, text-only control, adapters and probes, and the last adapter's rankings."""
    config, accelerator, terminal, captions = run.config, run.accelerator, run.terminal, run.captions
    with terminal.progress(f"loading {config.model.name}"):
        base, _, preprocess = create_model_and_transforms(
            config.model.name,
            config.model.pretrained,
            precision=config.model.precision,
            device=accelerator.device,
            prompt_config=config.prompt,
            image_resize_mode=config.model.resize_mode,
        )
        adapters = load_adapters(base, config.model.name, named)
    planned = planned_rows(adapters, probes, text_only, run.search)
    described = {
        "weights_sha256": base.base_hash,
        "quick_gelu": base.backbone.quick_gelu,
        "image_size": list(base.backbone.visual.image_size),
    }
    evaluation: Evaluation | None = None
    rankings: Rankings | None = None
    try:
        for name, model in (adapters or {"base": base}).items():
            collate = knowledge_collator(model, config.data.cache, config.data.cache_dtype)
            k = model.config.max_triplets
            prepare_texts(accelerator, terminal, collate.store, model, captions.all_texts(k, model.config.knowledge))
            frozen = prepare_images(
                accelerator,
                terminal,
                run.split,
                model,
                preprocess,
                config.data.cache,
                config.data.cache_dtype,
                config.data.batch_size,
                config.data.workers,
            )
            with terminal.progress("searching with the base model"):
                retrieval = SplitSearch.stored(captions, frozen, collate, run.search, accelerator.device)
            if evaluation is None:
                evaluation = run.begin(retrieval, described, named, planned)
                if text_only:
                    # The first model need not read states.
                    states = knowledge_collator(model, config.data.cache, config.data.cache_dtype, "states")
                    prepare_texts(accelerator, terminal, states.store, model, captions.all_texts(k, "states"))
                    text = enriched_text(retrieval.text, states(captions.knowledge))
                    run.add_rows(evaluation, retrieval, TEXT_ONLY.method, retrieval.rank_text(text))
            if not adapters:
                break

            def ranked(searched: SplitSearch, title: str, model=model) -> Rankings:
                with terminal.progress(title, "pairs") as report:
                    return searched.rank(model, accelerator.autocast, report, _partial(run.out), run.precision)

            rankings = ranked(retrieval, f"re-ranking with {name}")
            run.add_rows(evaluation, retrieval, name, rankings)
            for kind in probes if model.interaction.conditioned else ():
                spoilt = probe(retrieval, kind, model, preprocess, config.seed)
                found = ranked(spoilt, f"probe {kind} of {name}")
                run.add_rows(evaluation, retrieval, name, found, kind)
    except BaseException as error:
        if evaluation is not None and evaluation.missing:
            terminal.say(
                f"{run.out} holds the rows that were finished and lists the {len(evaluation.missing)} missing ones"
            )
        if isinstance(error, torch.OutOfMemoryError):
            raise AmpError(
                "the GPU's memory is full; give smaller --search.batch_size and --data.batch_size; the scores so far "
                "are kept"
            ) from error
        raise
    assert evaluation is not None  # the first model has begun it
    return evaluation, rankings


def evaluate(
    config: TrainConfig,
    split_name: str,
    adapters: list[str],
    search: RetrievalSettings,
    out: Path,
    gallery: str | None = None,
    probes: Sequence[Probe] = (),
    text_only: bool = False,
    bootstrap: int = 1000,
) -> ResultFile:
    """Evaluates the base model and adapters, prints the table and writes its files.

    Everything given is checked before a model is loaded. The files are written again after each adapter and probe, with
    the rows that are missing in the protocol. Scores of pairs are kept in OUT.partial while it runs: the same call goes
    on with them, on any number of processes.

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
    terminal, problems, named = Terminal(rank_of_launcher() == 0), Problems(), {}
    problems.found += precision_problems(config, None, torch.cuda.is_available())
    with problems.collect():
        named = named_adapters(adapters)
    with problems.collect():
        if gallery is not None and not adapters:
            raise AmpError("gallery needs an adapter to compare with the base model; add --adapters NAME=FILE")
    with problems.collect():
        if bootstrap < 0:
            raise AmpError(f"bootstrap is {bootstrap}, expected a number of samples, or 0 for no intervals")
    with problems.collect():
        split = ShardSplit(config.data.shards, split_name)
        with terminal.progress("reading captions"):
            captions = SplitCaptions.read(split, config.data.kinds, search.captions_per_image)
        search.check(captions.images)
        i2t_positives(captions.image, captions.images)
        if "shuffled" in probes:
            shuffled(captions.image, config.seed)
    with problems.collect():
        suffixes = (".json", ".csv", ".npz", ".verbs.csv")
        check_writable(*(out.with_suffix(suffix) for suffix in suffixes), *([gallery] if gallery is not None else []))
    problems.check()
    accelerator = make_accelerator(config, training=False)
    terminal.say(str(use_cores(config.data.workers, accelerator.device.type == "cuda")))
    precision = f"{config.model.precision}, autocast {accelerator.mixed_precision}"
    run = Run(config, split, captions, search, accelerator, terminal, precision, bootstrap, out)
    if named or text_only:
        captions.say_without_knowledge(terminal)
        evaluation, rankings = _with_models(run, named, probes, text_only)
    else:
        retrieval, described = baseline(config.model, config.data, split, captions, search, accelerator, terminal)
        evaluation = run.begin(retrieval, described, {})
    accelerator.wait_for_everyone()  # no process reads partial scores any more
    if accelerator.is_main_process:
        if named:
            rows = [row.name for row in evaluation.result.rows[1:]]
            verbs = {row: by_verb(evaluation.queries, row, captions.knowledge) for row in rows}
            save_verbs(out.with_suffix(".verbs.csv"), verbs)
        shutil.rmtree(_partial(out), ignore_errors=True)
        evaluation.result.print_table(PlainConsole())
        if gallery is not None and rankings is not None:
            draw_retrievals(Path(gallery), split, captions, rankings)
    accelerator.end_training()
    return evaluation.result
