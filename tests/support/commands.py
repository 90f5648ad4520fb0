"""Command lines for training and evaluation, and a helper that expects exactly one error."""

import os
import re
from pathlib import Path
from typing import Any

import pytest

from amp.evaluate.settings import EvaluationSettings

SMALL_PROMPT = {"knowledge": "both", "num_prompts": 2, "depth": 0.5}


def training_settings(shards, clip_folder: str, folder: Path, prompt: dict | None = None, **changes) -> dict[str, Any]:
    """Valid settings of launchers/train.py.

    Args:
        shards, clip_folder: The fixtures with these names.
        folder: Folder for the cache and the output; the output is `folder / "run" / "out.json"`.
        prompt: Prompt settings; SMALL_PROMPT by default.
        **changes: Other settings; ``__`` stands for a dot in a key.
    """
    settings = {
        "model.name": clip_folder,
        "model.pretrained": "null",
        "data.shards": shards,
        "data.cache": folder / "cache",
        "data.batch_size": 4,
        "data.workers": 0,
        "data.augment": "none",
        "data.val_split": "null",
        "stages": "[1]",
        "stage1.max_steps": 2,
        "trackers": "[]",
        "out": folder / "run" / "out.json",
    }
    settings |= {f"prompt.{key}": value for key, value in (prompt or SMALL_PROMPT).items()}
    return settings | {key.replace("__", "."): value for key, value in changes.items()}


def training_arguments(shards, clip_folder: str, folder: Path, **changes) -> list[str]:
    """`training_settings` as command-line arguments."""
    return arguments(training_settings(shards, clip_folder, folder, **changes))


def evaluation_settings(settings: dict) -> dict:
    """The settings of a training run that `amp evaluate` also has."""
    known = {"config", *EvaluationSettings.__dataclass_fields__}
    renamed = {key.removeprefix("data."): value for key, value in settings.items()}
    return {key: value for key, value in renamed.items() if key.partition(".")[0] in known}


def evaluation_arguments(shards, clip_folder: str, folder: Path, **changes) -> list[str]:
    """Valid arguments of `amp evaluate`."""
    settings = {
        "model.name": clip_folder,
        "shards": shards,
        "cache": folder / "cache",
        "batch_size": 4,
        "workers": 0,
        "out": folder / "run" / "out.json",
    }
    return arguments(settings | changes)


def arguments(settings: dict[str, Any]) -> list[str]:
    """Settings as command-line arguments, without those that are None."""
    return [part for key, value in settings.items() if value is not None for part in (f"--{key}", str(value))]


def one_error(call, capsys) -> str:
    """Expects `call` to exit with one line of error; returns that line without the command name."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        call()
    shown = capsys.readouterr()
    assert ended.value.code == 2 and "Traceback" not in shown.err + shown.out, shown.err
    lines = [line for line in shown.err.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"\S[^:]*: error: ", line)]
    assert len(errors) == 1 and lines[-1] == errors[0], shown.err
    return errors[0].partition(": ")[2]


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)
