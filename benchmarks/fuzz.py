"""Gives damaged files to all that reads files of others, in processes of their own, and counts how it ends.

    python -m benchmarks.fuzz --cases 200000 --seed 1 --out results/fuzz.json
    python -m benchmarks.fuzz --kinds '[png]' --first 4711 --cases 1     (one case again, with its traceback)

A case is accepted, skipped (an image of a conversion) or refused (an AmpError, or an exception that the reader
documents). Everything else is a failure: another exception, a process that crashes, takes longer than --seconds for a
case, or wants more memory than --memory_gb.
"""

import faulthandler
import json
import mmap
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from amp.errors import exit_on_error

with exit_on_error():
    from jsonargparse import auto_cli

    from benchmarks.mutate import KINDS

SHARES = {
    "jpeg": 0.37,
    "png": 0.23,
    "webp": 0.03,
    "gif": 0.02,
    "bmp": 0.015,
    "tiff": 0.03,
    "avif": 0.03,
    "tar": 0.14,
    "json": 0.06,
    "reply": 0.045,
    "adapter": 0.03,
}
ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Found:
    """How the cases of a kind ended.

    Attributes:
        outcomes: Cases by outcome: accepted, skipped, refused, failed.
        failures: Number of the case and what happened, the first twenty.
        slowest: CPU seconds of the slowest case, and its number.
        peak_mb: Memory of the process at its largest, with all libraries.
        seconds: CPU time.
    """

    outcomes: Counter = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)
    slowest: tuple[float, int] = (0.0, 0)
    peak_mb: float = 0.0
    seconds: float = 0.0

    def fail(self, number: int, what: str) -> None:
        self.outcomes["failed"] += 1
        if len(self.failures) < 20:
            self.failures.append((number, what))

    def add(self, other: "Found") -> None:
        self.outcomes += other.outcomes
        self.failures = [*self.failures, *map(tuple, other.failures)][:20]
        self.slowest = max(self.slowest, tuple(other.slowest))
        self.peak_mb = max(self.peak_mb, other.peak_mb)
        self.seconds += other.seconds


def fuzz(kind: str, cases: int, seed: int, first: int = 0, seconds: float = 10.0, memory_gb: float = 4.0) -> Found:
    """Runs cases number `first` to `first + cases - 1` of a kind.

    Args:
        kind: One of `benchmarks.mutate.KINDS`.
        cases: How many.
        seed: Of all of them.
        first: Number of the first.
        seconds: A case may take.
        memory_gb: Address space that cases may use beside the libraries'.
    """
    total = Found()
    end = first + cases
    while first < end:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "place"
            place.write_bytes(bytes(8))
            command = [
                sys.executable,
                "-X",
                "faulthandler",
                "-m",
                "benchmarks.fuzz",
                "--child",
                json.dumps([kind, seed, first, end, seconds, memory_gb, folder]),
            ]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")
            (number,) = struct.unpack("q", place.read_bytes())
            report = Path(folder) / "found.json"
            if done.returncode == 0:
                total.add(read_found(report))
                return total
            # What the child had found when it last wrote is kept; the cases since then are run again without this one.
            if report.is_file():
                part = read_found(report)
                total.add(part)
                first += part.outcomes.total()
            if first < number:
                total.add(fuzz(kind, number - first, seed, first, seconds, memory_gb))
            hung = "Timeout (" in done.stderr
            total.fail(number, f"{'hung' if hung else f'ended with {done.returncode}'}: {done.stderr[-1500:]}")
            first = number + 1
    return total


def read_found(path: Path) -> Found:
    content = json.loads(path.read_text())
    return Found(**content | {"outcomes": Counter(content["outcomes"])})


def child(kind: str, seed: int, first: int, end: int, seconds: float, memory_gb: float, folder: str) -> None:
    """Runs cases in this process; leaves the number of the case at hand in a file, which a crash can't take along."""
    from benchmarks import fuzz_targets

    warnings.simplefilter("ignore")
    found, root = Found(), Path(folder)
    files = fuzz_targets.corpus(kind)
    with open(root / "place", "r+b") as file:
        place = mmap.mmap(file.fileno(), 8)
    fuzz_targets.run(kind, files[0], root)  # what is imported on the way doesn't count as memory
    used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (used + int(memory_gb * 2**30),) * 2)
    for number in range(first, end):
        place[:] = struct.pack("q", number)
        if number % 50 == 0:
            save(found, root)
        content = fuzz_targets.case(kind, seed, number, files)
        faulthandler.dump_traceback_later(seconds, exit=True)
        start = time.process_time()
        try:
            found.outcomes[fuzz_targets.run(kind, content, root)] += 1
        except Exception:
            found.fail(number, traceback.format_exc()[-1500:])
        found.slowest = max(found.slowest, (time.process_time() - start, number))
    faulthandler.cancel_dump_traceback_later()
    save(found, root)


def save(found: Found, root: Path) -> None:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    # Not ru_maxrss, which a process inherits from the one that started it.
    (peak,) = (line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    content = {**vars(found), "peak_mb": int(peak) / 1024, "seconds": usage.ru_utime + usage.ru_stime}
    (root / "found.tmp").write_text(json.dumps(content))
    os.replace(root / "found.tmp", root / "found.json")


def main(
    cases: int = 10_000,
    seed: int = 1,
    kinds: list[str] = list(KINDS),  # noqa: B006
    first: int = 0,
    seconds: float = 10.0,
    memory_gb: float = 4.0,
    out: str | None = None,
    child: str | None = None,
) -> None:
    """Damaged files to all that reads files of others.

    Args:
        cases: Over all kinds; they share it as `SHARES` says.
        seed: Of all cases.
        kinds: Which of them.
        first: Number of each kind's first case.
        seconds: A case may take.
        memory_gb: Address space that cases may use beside the libraries'.
        out: JSON file of the figures.
        child: Of no use to a reader: what a process of its own runs.
    """
    if child is not None:
        run_child(*json.loads(child))
        return
    from rich.table import Table

    from amp.files import write_atomically
    from amp.terminal import PlainConsole

    whole = sum(SHARES[kind] for kind in kinds)
    found = {}
    for kind in kinds:
        count = max(1, round(cases * SHARES[kind] / whole))
        found[kind] = fuzz(kind, count, seed, first, seconds, memory_gb)
    outcomes = ("accepted", "skipped", "refused", "failed")
    table = Table("kind", "cases", *outcomes, "slowest case", "peak memory", "CPU time")
    for kind, x in found.items():
        counts = [x.outcomes.total(), *(x.outcomes[name] for name in outcomes)]
        table.add_row(
            kind,
            *(f"{count:,}" for count in counts),
            f"{1000 * x.slowest[0]:,.0f} ms",
            f"{x.peak_mb:,.0f} MB",
            f"{x.seconds:,.0f} s",
        )
    console = PlainConsole()
    console.print(table)
    for kind, x in found.items():
        for number, what in x.failures:
            console.print(f"{kind} {number} (--kinds '[{kind}]' --seed {seed} --first {number} --cases 1):")
            for line in what.splitlines():
                console.print(f"    {line}")
    if out is not None:
        content = {
            "seed": seed,
            "seconds_a_case": seconds,
            "memory_gb": memory_gb,
            "kinds": {kind: vars(x) for kind, x in found.items()},
        }
        write_atomically(out, f"{json.dumps(content, indent=1)}\n".encode())
    if any(x.failures for x in found.values()):
        raise SystemExit(1)


run_child = child

if __name__ == "__main__":
    with exit_on_error():
        auto_cli(main)
