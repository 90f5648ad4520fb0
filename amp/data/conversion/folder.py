"""Locks the folder that shards are written to, and removes what earlier runs left in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from amp.data.conversion.plan import PLANS, ShardPlan
from amp.data.shards.index import index_of, records_of
from amp.errors import AmpError
from amp.json_text import parse_json
from amp.locks import locked_folder

INDEXES = ".index"
"""Folder of the sidecars of indexed tar files. It isn't that of shards, which make_shards replaces and removes."""


def note_of(indexed_path: Path) -> Path:
    """Path of the sidecar of an indexed tar file (`ShardInfo.indexed_path`)."""
    return indexed_path.parent / INDEXES / f"{indexed_path.name}.json"


@contextmanager
def lock_folder(out: Path, shared: bool = False, notes: str = PLANS) -> Iterator[None]:
    """Creates the folder and locks it against other runs. The lock ends with the process.

    Args:
        out: The folder.
        shared: Whether other parts of the same conversion may write at the same time.
        notes: Folder of the sidecars: that of shards, or that of indexed tar files of other tools.

    Raises:
        AmpError: The folder can't be created or written, contains what may not be replaced, or is locked by another
            run.
    """
    try:
        # Look for tar files first: another part that is starting creates .plan before its first tar file.
        if notes == PLANS and any(out.glob("*.tar")) and not (out / PLANS).is_dir():
            raise AmpError(
                f"{out}: contains tar files that this tool didn't make; expected a new or empty folder, or a folder "
                "of its own shards; choose another --out"
            )
        for other, command in ((PLANS, "amp make_shards"), (INDEXES, "amp index_shards")):
            if notes != other and (out / other).is_dir():
                raise AmpError(
                    f"{out}: contains what {command} wrote; expected a folder without it; choose another --out"
                )
        (out / notes).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(out, error) from None
    busy = "another run is writing shards here; wait until it has finished, or choose another --out"
    with ExitStack() as stack:
        try:
            stack.enter_context(locked_folder(out / notes, busy, shared))
        except OSError as error:
            raise _cannot_write(out, error) from None
        yield


def surplus_shards(out: Path, plans: Sequence[ShardPlan], splits: Sequence[str]) -> list[str]:
    """Names of an earlier run's shards that are not in the plan.

    Raises:
        AmpError: Some of them belong to a split that isn't planned.
    """
    names = _unplanned(out / PLANS, plans)
    for name in names:
        if _split_of(name) not in splits:
            raise AmpError(
                f"{out}: contains shards of split {_split_of(name)!r} ({name}); expected only "
                f"{', '.join(sorted(splits))}; convert all splits in one run, or choose another --out"
            )
    return names


def surplus_of_splits(out: Path, plans: Sequence[ShardPlan], splits: Sequence[str]) -> list[str]:
    """Names of an earlier run's shards of these splits that are not in the plan."""
    return [name for name in _unplanned(out / PLANS, plans) if _split_of(name) in splits]


def clear_stale(out: Path, surplus: list[str]) -> None:
    """Removes surplus shards and the temporary files of earlier runs."""
    for name in surplus:
        (out / name).unlink(missing_ok=True)
        index_of(out / name).unlink(missing_ok=True)
        (out / PLANS / f"{name}.json").unlink(missing_ok=True)
    for folder in (out, out / PLANS):
        for temporary in folder.glob("*.tmp"):
            temporary.unlink(missing_ok=True)


def surplus_indexes(out: Path, plans: Sequence[ShardPlan], splits: Sequence[str]) -> list[str]:
    """Names of tar files that an earlier run has indexed for one of these splits, and that are not in the plan."""
    surplus = []
    for name in _unplanned(out / INDEXES, plans):
        try:
            noted = parse_json(note_of(out / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(noted, dict) and noted.get("split") in splits:
            surplus.append(name)
    return surplus


def clear_indexes(out: Path, surplus: list[str]) -> None:
    """Removes surplus indexes and records, and the temporary files of earlier runs. Leaves all other files."""
    for name in surplus:
        for path in (index_of(out / name), records_of(out / name), note_of(out / name)):
            path.unlink(missing_ok=True)
    for pattern in (".*.index.npy.*.tmp", ".*.records.jsonl.*.tmp", f"{INDEXES}/*.tmp"):
        for temporary in out.glob(pattern):
            temporary.unlink(missing_ok=True)


def _unplanned(notes: Path, plans: Sequence[ShardPlan]) -> list[str]:
    planned = {plan.path.name for plan in plans}
    return [name for name in (path.stem for path in notes.glob("*.tar.json")) if name not in planned]


def _split_of(shard: str) -> str:
    return shard.rsplit("-", 1)[0]


def _cannot_write(out: Path, error: OSError) -> AmpError:
    return AmpError(f"{out}: can't be created or written ({error.strerror}); choose another --out")
