"""Evaluates the base model and any number of adapters on one split."""

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
from amp.evaluate.adapters import (
    Adapter,
    base_of,
    cache_dtype_of,
    kinds_of,
    load_adapters,
    load_base,
    read_adapters,
    shards_of,
)
from amp.evaluate.baseline import baseline
from amp.evaluate.evaluation import SUFFIXES, Evaluation
from amp.evaluate.probes import check_probes, probe
from amp.evaluate.protocol import protocol
from amp.evaluate.results import ResultFile
from amp.evaluate.settings import EvaluationSettings
from amp.evaluate.text_only import enriched_text
from amp.files import check_writable
from amp.launch import precision_problems, rank_of_launcher, start_accelerator
from amp.model.clip import ActionAwareCLIP
from amp.retrieval.figures import BASE, RowKey
from amp.retrieval.first_stage import i2t_positives
from amp.retrieval.split_search import Rankings, SplitSearch
from amp.terminal import Terminal

TEXT_ONLY = RowKey("captions with states")


@dataclass(frozen=True)
class Evaluated:
    """Result of an evaluation.

    Attributes:
        result: Rows and protocol.
        split, captions: Split that was searched, and its captions.
        rankings: Rankings of the last adapter, or of the text-only control if there is no adapter; None if only the
            base model was evaluated.
        main: Whether this is the main process, which writes the files.
    """

    result: ResultFile
    split: ShardSplit
    captions: SplitCaptions
    rankings: Rankings | None
    main: bool


def evaluate(settings: EvaluationSettings) -> Evaluated:
    """Evaluates the base model and adapters, and writes the result files.

    All inputs are checked before a model is loaded. The files are updated after each adapter and probe, and their
    protocol lists the missing rows. The scores of pairs are saved in OUT.partial during the evaluation, so the same
    call continues an interrupted evaluation, with any number of processes.

    Raises:
        AmpError: Invalid input, such as an adapter of another base model.
    """
    run = Run.checked(settings)
    if run.adapters or settings.text_only:
        run.captions.say_without_knowledge(run.terminal)
        rankings = run.with_models()
    else:
        rankings = None
        retrieval, described = baseline(run.settings, run.split, run.captions, run.accelerator, run.terminal)
        run.begin(retrieval, described)
    run.accelerator.wait_for_everyone()  # to read the partial scores, which are deleted below
    main = run.accelerator.is_main_process
    assert run.evaluation is not None
    if main:
        if run.adapters:
            run.evaluation.save_verbs(settings.out, run.captions.knowledge)
        shutil.rmtree(run.partial, ignore_errors=True)
    run.accelerator.end_training()
    return Evaluated(run.evaluation.result, run.split, run.captions, rankings, main)


@dataclass
class Run:
    """State of an evaluation. `settings` have null values filled in from the adapters' records."""

    settings: EvaluationSettings
    adapters: dict[str, Adapter]
    split: ShardSplit
    captions: SplitCaptions
    accelerator: Accelerator
    terminal: Terminal
    evaluation: Evaluation | None = None

    @classmethod
    def checked(cls, settings: EvaluationSettings) -> "Run":
        """Reads and checks all inputs.

        Raises:
            AmpError: Some inputs are invalid. The message lists all errors.
        """
        terminal, problems = Terminal(rank_of_launcher() == 0), Problems()
        adapters: dict[str, Adapter] = {}
        out, gallery, search = settings.out, settings.gallery, settings.search
        problems.found += precision_problems(settings, None, torch.cuda.is_available())
        with problems.collect():
            adapters = read_adapters(settings.adapters)
            settings = replace(settings, model=base_of(settings.model, adapters))
        with problems.collect():
            if gallery is not None and not settings.adapters:
                raise AmpError("gallery is set without adapters, expected at least one; add --adapters NAME=FILE")
        for key, least in {"bootstrap": 0, "seed": 0, "workers": 0, "batch_size": 1}.items():
            with problems.collect():
                if getattr(settings, key) < least:
                    raise AmpError(f"{key} is {getattr(settings, key)}, expected at least {least}")
        with problems.collect():
            check_probes(settings.probes)
            kinds = kinds_of(settings.kinds, adapters)
            settings = replace(settings, kinds=kinds, cache_dtype=cache_dtype_of(settings, adapters))
            split = ShardSplit(shards_of(settings.shards, adapters), settings.split)
            with terminal.progress("reading captions"):
                captions = SplitCaptions.read(split, kinds, search.captions_per_image)
            search.check(captions.images)
            i2t_positives(captions.image, captions.images)
            check_probes(settings.probes, captions)
        with problems.collect():
            check_writable(
                *(out.with_suffix(suffix) for suffix in SUFFIXES), *([gallery] if gallery is not None else [])
            )
        problems.check()
        accelerator = start_accelerator(settings)
        terminal.say(str(use_cores(settings.workers, accelerator.device.type == "cuda")))
        return cls(settings, adapters, split, captions, accelerator, terminal)

    @property
    def partial(self) -> Path:
        """Folder for the scores of pairs during the evaluation."""
        return self.settings.out.with_suffix(".partial")

    @property
    def precision(self) -> str:
        """Types of weights and autocast, as text."""
        return f"{self.settings.model.precision}, autocast {self.accelerator.mixed_precision}"

    def with_models(self) -> Rankings | None:
        """Adds all rows, computed with loaded models, and returns the last rankings that are not of a probe."""
        settings, terminal = self.settings, self.terminal
        with terminal.progress(f"loading {settings.model.name}"):
            base, _, preprocess = load_base(settings.model, self.accelerator.device)
            models = load_adapters(base, str(settings.model.name), self.adapters)
        planned, rankings = planned_rows(models, settings), None
        described = {
            "weights_sha256": base.base_hash,
            "quick_gelu": base.backbone.quick_gelu,
            "image_size": list(base.backbone.visual.image_size),
        }
        try:
            for name, model in (models or {"base": base}).items():
                retrieval = self.searched(model, preprocess)
                if self.evaluation is None:
                    self.begin(retrieval, described, planned)
                    if settings.text_only:
                        rankings = self.text_only(model, retrieval)
                if not models:
                    break
                rankings = self.ranked(model, retrieval, f"re-ranking with {name}")
                self.add(name, rankings)
                for kind in settings.probes if model.interaction.conditioned else ():
                    corrupted = probe(retrieval, kind, model, preprocess, settings.seed)
                    self.add(name, self.ranked(model, corrupted, f"probe {kind} of {name}"), kind)
        except BaseException as error:
            if self.evaluation is not None and self.evaluation.missing:
                terminal.say(
                    f"{settings.out} contains the finished rows and lists the {len(self.evaluation.missing)} missing "
                    "rows"
                )
            if isinstance(error, torch.OutOfMemoryError):
                raise AmpError(
                    "the GPU is out of memory; reduce --search.batch_size and --batch_size; the same command continues "
                    "with the scores so far"
                ) from error
            raise
        return rankings

    def searched(self, model: ActionAwareCLIP, preprocess) -> SplitSearch:
        """Runs the first stage on the split, with all features that `model` needs."""
        settings, accelerator, terminal = self.settings, self.accelerator, self.terminal
        cache, dtype = settings.cache, str(settings.cache_dtype)
        collate = knowledge_collator(model, cache, dtype)
        texts = self.captions.all_texts(model.config.max_triplets, model.config.knowledge)
        prepare_texts(accelerator, terminal, collate.store, model, texts)
        batch_size, first = settings.batch_size, accelerator.process_index / accelerator.num_processes
        frozen = prepare_images(
            terminal, self.split, model, preprocess, cache, dtype, batch_size, settings.workers, first=first
        )
        with terminal.progress("searching with the base model"):
            return SplitSearch.stored(self.captions, frozen, collate, settings.search, accelerator.device)

    def text_only(self, model: ActionAwareCLIP, retrieval: SplitSearch) -> Rankings:
        """Adds the row of the text-only control. It uses states even if `model` does not."""
        collate = knowledge_collator(model, self.settings.cache, str(self.settings.cache_dtype), "states")
        texts = self.captions.all_texts(model.config.max_triplets, "states")
        prepare_texts(self.accelerator, self.terminal, collate.store, model, texts)
        rankings = retrieval.rank_text(enriched_text(retrieval.text, collate(self.captions.knowledge)))
        self.add(TEXT_ONLY.method, rankings)
        return rankings

    def ranked(self, model: ActionAwareCLIP, retrieval: SplitSearch, title: str) -> Rankings:
        """Ranks the split with a model."""
        with self.terminal.progress(title, "pairs") as report:
            return retrieval.rank(model, self.accelerator.autocast, report, self.partial, self.precision)

    def begin(self, retrieval: SplitSearch, described: dict, rows: Sequence[RowKey] = ()) -> None:
        """Starts the result with the base model's row."""
        settings = self.settings
        found = protocol(settings, self.split, self.captions, self.adapters, self.precision, described)
        with self.terminal.progress(f"figures of {BASE}"):
            self.evaluation = Evaluation(found, retrieval, rows, settings.bootstrap, settings.seed)
            self.save()

    def add(self, method: str, rankings: Rankings, kind: str = "") -> None:
        """Adds the rows of a method's rankings."""
        assert self.evaluation is not None
        with self.terminal.progress(f"figures of {RowKey(method, probe=kind)}"):
            self.evaluation.add(method, rankings, kind)
            self.save()

    def save(self) -> None:
        """Writes the rows so far, so that an interruption loses only the row in progress."""
        if self.accelerator.is_main_process and self.evaluation is not None:
            self.evaluation.save(self.settings.out)


def planned_rows(models: dict[str, ActionAwareCLIP], settings: EvaluationSettings) -> list[RowKey]:
    """Returns the keys of all rows except the base model's.

    Raises:
        AmpError: Two rows would have the same name.
    """
    rows = [TEXT_ONLY] if settings.text_only else []
    for name, model in models.items():
        conditioned = model.interaction.conditioned
        modes, inputs = (settings.search.i2t, ("", *settings.probes)) if conditioned else ([""], [""])
        rows += [RowKey(name, mode, kind) for kind in inputs for mode in modes]
    twice = next((row for row, count in Counter(map(str, [BASE, *rows])).items() if count > 1), None)
    if twice is not None:
        raise AmpError(
            f"two rows would be named {twice!r}, expected unique names; look for an adapter name, a probe or a value "
            "of search.i2t that is given twice"
        )
    return rows
