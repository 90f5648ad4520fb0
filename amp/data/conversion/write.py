"""Writes one shard, or all planned shards in several processes."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from typing import Any

from amp.cores import usable_cores
from amp.data.captions.base import Skip
from amp.data.conversion.plan import ShardPlan
from amp.data.images.file import read_image
from amp.data.images.formats import UnreadableImageError
from amp.data.images.names import find_file
from amp.data.shards.index import Span, index_bytes, index_of, side_file
from amp.data.shards.record import record_bytes
from amp.data.shards.tar import HashedFile, add_member, end_archive
from amp.errors import AmpError
from amp.files import whole_file, write_json
from amp.terminal import PlainConsole


def write_shard(plan: ShardPlan, progress: Callable[[], None] = lambda: None, accept_gaps: bool = True) -> None:
    """Writes one shard and its sidecar.

    This does not use `webdataset.TarWriter`. Importing webdataset imports torch, which takes seconds and hundreds of
    megabytes per worker process. It also sorts members, which would put `KEY.json` before `KEY.png`.

    Args:
        plan: Plan of the shard.
        progress: Called once per image.
        accept_gaps: Whether to keep a shard that lacks images which the next run may be able to read. If False, only
            its sidecar is written, and the shard counts as missing.

    Raises:
        AmpError: The shard can't be written, for example because the disk is full.
    """
    # Unique across machines, because another job may be writing the same shard.
    suffix = f".{uuid.uuid4().hex}.tmp"
    temporary = plan.path.with_name(plan.path.name + suffix)
    temporary_sidecar = plan.sidecar.with_name(plan.sidecar.name + suffix)
    skipped: list[Skip] = []
    spans: list[tuple[Span, Span]] = []
    captions = without_knowledge = 0
    retry = False
    try:
        with open(temporary, "wb") as file:
            hashed = HashedFile(file)
            for key, image in plan.samples:
                try:
                    content, extension = read_image(find_file(plan.images_root, image.path), plan.resize, plan.check)
                except UnreadableImageError as error:
                    # Permissions or a disk can be fixed without changing the file's mtime, so the next run tries again.
                    retry |= error.may_pass
                    reason = str(error)
                    skipped.append(Skip("unreadable_image", image.path, reason, image.split, len(image.captions)))
                else:
                    photo = add_member(hashed, f"{key}.{extension}", content)
                    spans.append((photo, add_member(hashed, f"{key}.json", record_bytes(key, image))))
                    captions += len(image.captions)
                    without_knowledge += sum(caption.knowledge is None for caption in image.captions)
                progress()
            end_archive(hashed)
            file.flush()
            os.fsync(file.fileno())
        # Remove the old sidecar first, so that a sidecar never describes a different tar file.
        plan.sidecar.unlink(missing_ok=True)
        index = index_bytes(spans)
        if not spans:
            plan.path.unlink(missing_ok=True)
            index_of(plan.path).unlink(missing_ok=True)
        elif accept_gaps or not retry:
            with whole_file(index_of(plan.path), sync=True) as index_file:
                index_file.write(index)
            os.replace(temporary, plan.path)
        write_json(
            temporary_sidecar,
            {
                "plan": plan.hash,
                "samples": len(spans),
                "captions": captions,
                "captions_without_knowledge": without_knowledge,
                "bytes": hashed.size,
                "sha256": hashed.sha256.hexdigest(),
                "index": asdict(side_file(index)),
                "skipped": [asdict(skip) for skip in skipped],
                "retry": retry,
                "check": plan.check,
            },
        )
        os.replace(temporary_sidecar, plan.sidecar)
    except OSError as error:
        raise AmpError(
            f"{plan.path}: can't be written ({error.strerror or error}); make room or fix the folder, then run "
            "the same command again; finished shards are kept"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
        temporary_sidecar.unlink(missing_ok=True)


def write_all(plans: list[ShardPlan], workers: int | None, console: PlainConsole, accept_gaps: bool) -> None:
    """Writes shards in several processes and shows how many images are done.

    Args:
        plans: Plans of the shards.
        workers: Number of processes; None for one per usable CPU.
        console: Console for progress output.
        accept_gaps: See `write_shard`.

    Raises:
        AmpError: A shard can't be written, or a process was killed.
    """
    if not plans:
        return
    workers = min(workers or usable_cores(), len(plans))
    total = sum(len(plan.samples) for plan in plans)
    with console.progress(f"writing {len(plans)} shards", "images", keep=True) as report:
        if workers == 1:
            done = itertools.count(1)
            for plan in plans:
                write_shard(plan, lambda: report(next(done), total), accept_gaps)
            return
        # A forked process would inherit the folder's lock, and could inherit a lock of the progress bar's thread that
        # is never released.
        context = multiprocessing.get_context("spawn")
        counter = context.Value("q", 0)
        with ProcessPoolExecutor(workers, context, _start_worker, (counter,)) as pool:
            pending = {pool.submit(_write_in_worker, plan, accept_gaps) for plan in plans}
            try:
                while pending:
                    finished, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                    report(counter.value, total)
                    for future in finished:
                        future.result()
            except KeyboardInterrupt:
                console.say("stopping after the shards that are being written")
                raise
            except BrokenProcessPool:
                raise AmpError(
                    "a worker process was killed, most likely because memory ran out; run the same command with fewer "
                    "--workers; finished shards are kept"
                ) from None
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


_counter: Any = None  # number of finished images, shared by the workers


def _start_worker(counter: Any) -> None:
    global _counter
    _counter = counter
    # Ctrl-C reaches the whole process group, but the parent waits for the shards that are being written.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Nothing else ends this process if the parent is killed.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "this runs in a worker process"
    parent.join()
    os._exit(1)


def _write_in_worker(plan: ShardPlan, accept_gaps: bool) -> None:
    write_shard(plan, _count_image, accept_gaps)


def _count_image() -> None:
    with _counter.get_lock():
        _counter.value += 1
