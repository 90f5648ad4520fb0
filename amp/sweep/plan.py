"""The runs of a sweep: their identity, their folders and what these hold already."""

import argparse
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser

from amp.errors import AmpError
from amp.retrieval.evaluate import RetrievalSettings
from amp.retrieval.results import ResultFile
from amp.sweep.config import Row, SweepConfig
from amp.train.config import TrainConfig

State = Literal["done", "trained", "missing", "changed"]
RUN, RESULTS = "run.json", "results.json"


@dataclass(frozen=True)
class Run:
    """A row with a seed.

    Attributes:
        row: Name of the first row with this configuration.
        seed: Of the training.
        folder: Holds the adapters, logs and results.
        arguments: Of launchers/train.py, all but ``--out``.
        adapter: File of the last stage.
        training: Digest of all keys that the files and arguments set.
        evaluation: Digest of these and of how the adapter is evaluated.
    """

    row: str
    seed: int
    folder: Path
    arguments: tuple[str, ...]
    adapter: Path
    training: str
    evaluation: str

    @property
    def name(self) -> str:
        return f"{self.row}, seed {self.seed}"

    @property
    def results(self) -> Path:
        return self.folder / RESULTS

    def state(self) -> State:
        """What the folder holds; ``changed``: an adapter or a result of another configuration."""
        seen, expected = self.digests()
        if seen != expected:
            return "changed"
        if self.results.is_file():
            return "done"
        return "trained" if self.adapter.is_file() else "missing"

    def digests(self) -> tuple[str | None, str | None]:
        """The digest that the folder's content carries, and the expected one; None for an empty folder."""
        if self.results.is_file():
            # Results count without the adapter, which may have been deleted to save space.
            return ResultFile.load_json(self.results).protocol.get("run", {}).get("digest", "none"), self.evaluation
        if any(self.folder.glob("stage*/adapter.safetensors")):
            return self.trained_as() or "none", self.training
        return None, None

    def trained_as(self) -> str | None:
        """Digest of the training that was last started in the folder; None if no sweep started one."""
        path = self.folder / RUN
        try:
            return str(json.loads(path.read_text(encoding="utf-8"))["training"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise AmpError(
                f"{path}: can't be read as what a sweep writes ({error!r}); remove {self.folder} to run it anew"
            ) from error


def plan(config: SweepConfig) -> dict[str, list[Run]]:
    """The runs of each trained row, by the row's name and in the order of the seeds.

    Raises:
        AmpError: A row's keys are wrong or contradict each other, or two rows can't be told apart.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(TrainConfig, as_group=False)
    runs, by_content, slugs = {}, {}, {}
    for row in (row for table in config.tables for row in table.rows if row.train):
        arguments = row_arguments(config, row)
        keys, stages = resolve(parser, arguments, row.name)
        content = json.dumps(keys, sort_keys=True, default=str)
        if content not in by_content:
            slug = re.sub(r"\W+", "-", row.name.lower()).strip("-") or "row"
            if slug in slugs:
                raise AmpError(
                    f"rows {slugs[slug]!r} and {row.name!r} differ and would share the folder {config.folder / slug}, "
                    "expected one configuration a name; rename one"
                )
            slugs[slug] = row.name
            by_content[content] = [make_run(config, row, slug, arguments, keys, stages, seed) for seed in config.seeds]
        elif row.name in runs and runs[row.name] is not by_content[content]:
            raise AmpError(f"two rows are named {row.name!r} and differ, expected one configuration a name; rename one")
        runs[row.name] = by_content[content]
    return runs


def row_arguments(config: SweepConfig, row: Row) -> list[str]:
    """Arguments of launchers/train.py, all but the seed and the folder."""
    files = [f"--config={path}" for path in [*config.base, *row.configs]]
    return files + [f"--{key}={as_argument(value)}" for key, value in {**config.set, **row.set}.items()]


def resolve(parser: ArgumentParser, arguments: list[str], row: str) -> tuple[dict, list[int]]:
    """The keys that files and arguments set together, and the stages that are trained.

    Defaults are left out of the keys, so that a key that is new in the program leaves finished runs what they are.
    """
    try:
        keys = parser.parse_args(arguments, defaults=False).as_dict()
        settings = parser.instantiate(parser.parse_args(arguments))
        del settings["config"]
        full = TrainConfig(**settings)
        full.check()
    except (argparse.ArgumentError, AmpError) as error:
        text = " ".join(str(error).split())
        raise AmpError(f"row {row!r}: {text}; see `base`, `set` and the row's `configs` and `set`") from error
    # Where a run is written to is no part of what it is, and the files count by their content.
    for key in ("out", "config", "seed"):
        keys.pop(key, None)
    return keys, full.stages


def make_run(config: SweepConfig, row: Row, slug: str, arguments: list[str], keys: dict, stages: Sequence[int],
             seed: int) -> Run:  # fmt: skip
    folder = config.folder / slug / f"seed{seed}"
    training = digest({**keys, "seed": seed})
    evaluation = digest([training, config.split, search_keys(config), sorted(config.probes), config.text_only])
    adapter = folder / f"stage{stages[-1]}" / "adapter.safetensors"
    return Run(row.name, seed, folder, (*arguments, f"--seed={seed}"), adapter, training, evaluation)


def digest(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]


def search_keys(config: SweepConfig) -> dict:
    """The keys of the search that differ from the defaults."""
    default = asdict(RetrievalSettings())
    return {key: value for key, value in asdict(config.search).items() if value != default[key]}


def as_argument(value) -> str:
    """A YAML value as the launchers' command line reads it."""
    return value if isinstance(value, str) else json.dumps(value)


def refuse_changed(runs: Sequence[Run]) -> None:
    """Raises AmpError for folders that hold something of another configuration."""
    changed = [run for run in runs if run.state() == "changed"]
    if not changed:
        return
    seen, expected = changed[0].digests()
    more = f" (and {len(changed) - 1} more folders)" if len(changed) > 1 else ""
    raise AmpError(
        f"{changed[0].folder}{more} holds a run of digest {seen}, expected {expected} of {changed[0].name}: its "
        "configuration, its seed or how it is evaluated has changed. Move the folder away, or add --rerun_changed true "
        "to delete it and run it anew"
    )
