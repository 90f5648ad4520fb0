"""What processes hold, read from /proc (Linux), and whether it grows."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

WARM_UP = 0.1  # of a run's time: caches fill, allocators find their size
WINDOWS = 60  # a minute each in a run of an hour
# A leak of one kB a step is above 2 % an hour for a process of 400 MB that takes five steps a second. Below a MB lies
# what an allocator takes and gives back: glibc's arenas grow in pieces of 132 kB, torch's caches in pieces of 2 MB.
MEMORY_SHARE, MEMORY_FLOOR_MB = 0.02, 1.0
KIB = 1.024e-3  # what /proc calls a kB, in MB
COUNT_RISE = 0.5  # what a line through one more makes, if it comes before the last tenth


@dataclass(frozen=True)
class Held:
    """What one process holds.

    Attributes:
        memory_MB: Anonymous and shared memory, a page that n processes map counted 1/n for each, so that a sum over
            processes counts it once. Mapped files are left out: the system drops them when it likes, and libraries are
            divided by processes that have nothing to do with the run.
        resident_MB: All of its pages, as `top` shows it.
        descriptors: Open file descriptors.
        threads: Its threads.
        children: Its child processes.
        shared_files: Mapped pieces of shared memory.
    """

    memory_MB: float
    resident_MB: float
    descriptors: int
    threads: int
    children: int
    shared_files: int


COUNTS = ("descriptors", "threads", "children", "shared_files")


def held(process: int) -> Held:
    """What a process holds now.

    Raises:
        OSError: It has ended.
    """
    folder = Path(f"/proc/{process}")
    kb = {}
    for line in (folder / "smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split()[:2]
        kb[name.rstrip(":")] = int(value)
    maps = (folder / "maps").read_text()
    return Held(
        round(KIB * (kb["Pss_Anon"] + kb["Pss_Shmem"]), 2),
        round(KIB * kb["Rss"], 2),
        len(os.listdir(folder / "fd")),
        len(os.listdir(folder / "task")),
        len(children(process)),
        sum("/dev/shm/" in line or "/memfd:" in line for line in maps.splitlines()),
    )


def children(process: int) -> list[int]:
    """Child processes in the order of their ids; none where it has ended."""
    found = []
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            found += [int(child) for child in path.read_text().split()]
        except OSError:  # a thread that has ended
            continue
    return sorted(found)


@dataclass(frozen=True)
class Trend:
    """A line through what lies behind the warm-up.

    Attributes:
        mean: Of the values.
        an_hour: Slope of the line.
        share_an_hour: Slope as a share of the mean; 0 where the mean is.
        rise: From the beginning of the line to its end.
        growing: Whether that is more than noise.
    """

    mean: float
    an_hour: float
    share_an_hour: float
    rise: float
    growing: bool


def trend(seconds: Sequence[float], values: Sequence[float], count: bool) -> Trend:
    """Fits a line through the least value of each window: a leak lifts the floor, where what a step, a save or a
    validation holds for a moment lies above it.

    Args:
        seconds: When the values were read.
        values: At least two of them behind the warm-up.
        count: Of things, which must not become more by one; else MB, which may rise by `MEMORY_SHARE` an hour, and by
            `MEMORY_FLOOR_MB` in any time.
    """
    time, value = np.asarray(seconds, float), np.asarray(values, float)
    behind = time >= time[0] + WARM_UP * (time[-1] - time[0])
    time, value = time[behind], value[behind]
    windows = np.array_split(np.arange(len(time)), min(WINDOWS, max(2, len(time) // 10)))
    floors = np.array([value[window].min() for window in windows])
    centres = np.array([time[window].mean() for window in windows])
    slope = float(np.polyfit(centres - centres[0], floors, 1)[0])
    rise, mean, hours = slope * (time[-1] - time[0]), float(value.mean()), (time[-1] - time[0]) / 3600
    limit = COUNT_RISE if count else max(MEMORY_SHARE * mean * hours, MEMORY_FLOOR_MB)
    share = 3600 * slope / mean if mean else 0.0
    return Trend(round(mean, 2), round(3600 * slope, 3), round(share, 5), round(rise, 3), bool(rise >= limit))


class Watch:
    """Series of what processes hold, by their roles in a run.

    Attributes:
        seconds: When each sample was read.
        series: By role, by attribute of `Held`, a value a sample; NaN where the process was not there.
        processes: By role, the ids of those that were seen, in order.
    """

    def __init__(self):
        self.seconds: list[float] = []
        self.series: dict[str, dict[str, list[float]]] = {}
        self.processes: dict[str, list[int]] = {}

    def sample(self, now: float, roles: dict[str, int]) -> None:
        """Reads the processes of `roles`, by name."""
        self.seconds.append(now)
        for role, process in roles.items():
            try:
                values = asdict(held(process))
            except OSError:  # it has ended since it was found
                continue
            self.add(role, values)
            if process not in self.processes.setdefault(role, []):
                self.processes[role].append(process)

    def add(self, role: str, values: dict[str, float]) -> None:
        """Further values of the newest sample."""
        for name, value in values.items():
            series = self.series.setdefault(role, {}).setdefault(name, [])
            series += [float("nan")] * (len(self.seconds) - 1 - len(series)) + [value]

    def trends(self) -> dict[str, dict[str, Trend]]:
        """The trend of each series that is memory or a count."""
        found = {}
        for role, series in self.series.items():
            for name, values in series.items():
                if not name.endswith("_MB") and name not in COUNTS:
                    continue
                there = [(s, v) for s, v in zip(self.seconds, values, strict=False) if v == v]
                if len(there) > 3:
                    found.setdefault(role, {})[name] = trend(*zip(*there, strict=True), count=name in COUNTS)
        return found
