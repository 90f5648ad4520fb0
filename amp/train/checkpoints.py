"""Checkpoints: folders that appear complete or not at all. The newest K per stage are kept, and checked before use.

    OUT/checkpoints/stage1-step00000120/adapter.safetensors     adapter weights in fp32, for `load_adapter`
                                        optimizer.safetensors   AdamW's moments by parameter name
                                        state.json              position, settings, and the sha256 of the two files

The frozen CLIP is not included. A checkpoint doesn't depend on the engine or the number of processes, and it needs no
state of random generators: order, captions, crops, negatives and random draws are functions of (seed, epoch, step).
"""

import json
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from amp.errors import AmpError, shorten
from amp.files import sha256_of
from amp.json_text import parse_json
from amp.model.adapter import read_adapter
from amp.version import __version__

FORMAT = "open-clip-amp checkpoint"
FORMAT_VERSION = 1
ADAPTER, OPTIMIZER, STATE = "adapter.safetensors", "optimizer.safetensors", "state.json"
_TYPES = {
    "stage": int,
    "step": int,
    "steps": int,
    "updates": int,
    "skipped": int,
    "loss_scale": dict,
    "run": dict,
    "files": dict,
}


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        folder: Folder of the checkpoint.
        state: Content of `state.json`.
    """

    folder: Path
    state: dict[str, Any]

    @property
    def stage(self) -> int:
        return self.state["stage"]

    @property
    def step(self) -> int:
        """Number of optimizer steps taken in the stage."""
        return self.state["step"]

    @property
    def finished(self) -> bool:
        """Whether the stage is complete."""
        return self.step >= self.state["steps"]

    def weights(self) -> dict[str, torch.Tensor]:
        return read_adapter(self.folder / ADAPTER)[1]

    def moments(self) -> dict[str, torch.Tensor]:
        try:
            return load_file(self.folder / OPTIMIZER)
        except (OSError, SafetensorError) as error:
            raise AmpError(f"{self.folder / OPTIMIZER}: not a complete safetensors file ({error})") from error


class Checkpoints:
    """The checkpoints of a run's folder.

    Args:
        out: Folder of the run.
        keep: Number of checkpoints kept per stage.
    """

    def __init__(self, out: str | os.PathLike, keep: int = 2):
        self.folder, self.keep = Path(out) / "checkpoints", keep

    def save(self, stage: int, step: int, write: Callable[[Path], None], state: dict[str, Any]) -> Path:
        """Writes a checkpoint under a temporary name, renames it, then removes the stage's oldest ones.

        Args:
            stage, step: Position of the checkpoint, which becomes its name.
            write: Writes the adapter and optimizer files into the given folder.
            state: Content of `state.json` in addition to format, stage and step.

        Raises:
            AmpError: The checkpoint can't be written. Earlier ones are untouched, and no part of it is left.
        """
        target = self.folder / f"stage{stage}-step{step:08d}"
        temporary = self.folder / f".tmp-{uuid.uuid4().hex}"
        try:
            temporary.mkdir(parents=True)
            write(temporary)
            files = {name: sha256_of(temporary / name) for name in (ADAPTER, OPTIMIZER)}
            record = {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "version": __version__,
                "stage": stage,
                "step": step,
                **state,
                "files": files,
            }
            (temporary / STATE).write_text(json.dumps(record, indent=1))
            for name in (ADAPTER, OPTIMIZER, STATE):
                sync(temporary / name)
            if target.exists():  # a run that resumed from an older checkpoint gets here again
                shutil.rmtree(target)
            os.rename(temporary, target)
            sync(self.folder)
        except Exception as error:  # safetensors has its own exception for a full disk
            free = shutil.disk_usage(self.folder if self.folder.is_dir() else ".").free
            raise AmpError(
                f"{target}: can't be written ({error}), {free / 1e9:.2f} GB are free there. Make room; earlier "
                "checkpoints are intact"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        for old in self.names(stage)[: -self.keep]:
            shutil.rmtree(self.folder / old, ignore_errors=True)
        return target

    def names(self, *stages: int) -> list[str]:
        """Names of the stages' checkpoint folders, oldest first."""
        return sorted(path.name for stage in stages for path in self.folder.glob(f"stage{stage}-step[0-9]*"))

    def newest(self, stages: list[int], say: Callable[[str], None] = lambda text: None) -> Checkpoint | None:
        """The newest complete checkpoint of some stages. Damaged ones are reported through `say` and skipped."""
        for name in reversed(self.names(*stages)):
            try:
                return open_checkpoint(self.folder / name)
            except AmpError as error:
                say(f"{error}. The checkpoint before it is used")
        return None

    def remove_unfinished(self) -> None:
        """Removes temporary folders that a killed process left behind."""
        for path in self.folder.glob(".tmp-*"):
            shutil.rmtree(path, ignore_errors=True)

    def remove(self, stage: int) -> None:
        """Removes all checkpoints of a stage."""
        for name in self.names(stage):
            shutil.rmtree(self.folder / name, ignore_errors=True)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Opens a checkpoint after checking that its files are unchanged.

    Raises:
        AmpError: A file is missing, truncated or changed, or the format version differs.
    """
    path = folder / STATE
    try:
        state = parse_json(path.read_text())
        if state["format"] != FORMAT or state["format_version"] != FORMAT_VERSION:
            raise AmpError(
                f"{path}: format is {state['format']!r} version {state['format_version']}, expected {FORMAT!r} version "
                f"{FORMAT_VERSION}; it was written by open-clip-amp {state.get('version')}"
            )
        for key, kind in _TYPES.items():
            if not isinstance(state[key], kind) or isinstance(state[key], bool):
                raise AmpError(f"{path}: {key!r} is {shorten(state[key])}, expected {kind.__name__}")
        if state["files"].keys() != {ADAPTER, OPTIMIZER}:
            raise AmpError(f"{path}: 'files' names {shorten(sorted(state['files']))}, expected {ADAPTER}, {OPTIMIZER}")
        for name, digest in state["files"].items():
            if sha256_of(folder / name) != digest:
                raise AmpError(f"{folder / name}: damaged: its sha256 differs from the one in {STATE}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, AmpError):
            raise
        raise AmpError(f"{path}: not a complete checkpoint ({error!r})") from error
    return Checkpoint(folder, state)


def sync(path: Path) -> None:
    """Forces a file, or a folder's entries, to disk, so that a power cut leaves no name without its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
