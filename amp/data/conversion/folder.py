"""Locks the folder that shards are written to, and removes what earlier runs left in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from amp.data.conversion.plan import ShardPlan
from amp.data.shards.index import index_of
from amp.errors import AmpError
from amp.locks import locked_folder


@contextmanager
def lock_folder(out: Path, shared: bool = False) -> Iterator[None]:
    """Creates the folder and locks it against other runs. The lock ends with the process.

    Args:
        out: The folder.
        shared: Whether other parts of the same conversion may write at the same time.

    Raises:
        AmpError: The folder can't be created or written, contains tar files from another tool, or is locked by another
            run.
    """
    plan_folder = out / ".plan"
    try:
        # Look for tar files first: another part that is starting creates .plan before its first tar file.
        if any(out.glob("*.tar")) and not plan_folder.is_dir():
            raise AmpError(
                f"{out}: contains tar files that this tool didn't make; expected a new or empty folder, or a folder "
                "of its own shards; choose another --out"
            )
        plan_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(out, error) from None
    busy = "another run is writing shards here; wait until it has finished, or choose another --out"
    with ExitStack() as stack:
        try:
            stack.enter_context(locked_folder(plan_folder, busy, shared))
        except OSError as error:
            raise _cannot_write(out, error) from None
        yield


def surplus_shards(out: Path, plans: list[ShardPlan]) -> list[str]:
    """Names of an earlier run's shards that are not in the plan.

    Raises:
        AmpError: Some of them belong to a split that isn't planned.
    """
    planned = {plan.path.name for plan in plans}
    splits = {name.rsplit("-", 1)[0] for name in planned}
    surplus = [name for name in (path.stem for path in (out / ".plan").glob("*.tar.json")) if name not in planned]
    for name in surplus:
        split = name.rsplit("-", 1)[0]
        if split not in splits:
            raise AmpError(
                f"{out}: contains shards of split {split!r} ({name}); expected only {', '.join(sorted(splits))}; "
                "convert all splits in one run, or choose another --out"
            )
    return surplus


def clear_stale(out: Path, surplus: list[str]) -> None:
    """Removes surplus shards and the temporary files of earlier runs."""
    for name in surplus:
        (out / name).unlink(missing_ok=True)
        index_of(out / name).unlink(missing_ok=True)
        (out / ".plan" / f"{name}.json").unlink(missing_ok=True)
    for folder in (out, out / ".plan"):
        for temporary in folder.glob("*.tmp"):
            temporary.unlink(missing_ok=True)


def _cannot_write(out: Path, error: OSError) -> AmpError:
    return AmpError(f"{out}: can't be created or written ({error.strerror}); choose another --out")
