"""The folder that shards are written to: locked while they are, and cleared of what earlier runs left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from amp.data.conversion.plan import ShardPlan
from amp.errors import AmpError
from amp.locks import locked_folder


@contextmanager
def lock_folder(out: Path, shared: bool = False) -> Iterator[None]:
    """Makes the folder and keeps other runs out of it. The lock ends with the process.

    Args:
        out: The folder.
        shared: Let other parts in.

    Raises:
        AmpError: The folder can't be made or written, holds tar files of others, or another run holds it.
    """
    plan_folder = out / ".plan"
    try:
        # In this order, since another part may be making both: its .plan comes first.
        if any(out.glob("*.tar")) and not plan_folder.is_dir():
            raise AmpError(
                f"{out}: holds tar files that this tool didn't make; expected a new or empty folder, or one of its "
                "own; choose another --out"
            )
        plan_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(out, error) from None
    busy = "another run is writing shards here; wait for it to end, or choose another --out"
    with ExitStack() as stack:
        try:
            stack.enter_context(locked_folder(plan_folder, busy, shared))
        except OSError as error:
            raise _cannot_write(out, error) from None
        yield


def surplus_shards(out: Path, plans: list[ShardPlan]) -> list[str]:
    """Names of an earlier run's shards that the plan replaces.

    Raises:
        AmpError: Shards of a split that isn't planned.
    """
    planned = {plan.path.name for plan in plans}
    splits = {name.rsplit("-", 1)[0] for name in planned}
    surplus = [name for name in (path.stem for path in (out / ".plan").glob("*.tar.json")) if name not in planned]
    for name in surplus:
        split = name.rsplit("-", 1)[0]
        if split not in splits:
            raise AmpError(
                f"{out}: holds shards of split {split!r} ({name}), which isn't among {', '.join(sorted(splits))}; "
                "convert all splits in one run, or choose another --out"
            )
    return surplus


def clear_stale(out: Path, surplus: list[str]) -> None:
    """Removes what earlier runs left: surplus shards and temporary files."""
    for name in surplus:
        (out / name).unlink(missing_ok=True)
        (out / ".plan" / f"{name}.json").unlink(missing_ok=True)
    for folder in (out, out / ".plan"):
        for temporary in folder.glob("*.tmp"):
            temporary.unlink(missing_ok=True)


def _cannot_write(out: Path, error: OSError) -> AmpError:
    return AmpError(f"{out}: can't be made or written ({error.strerror}); choose another --out")
