"""Times several ways to do the same work in turns, so that a change in machine speed affects all of them."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping

import torch

Way = Callable[[], int]


def synchronize(device: str | torch.device = "cpu") -> None:
    """Waits until a GPU has finished its work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def in_turns(
    ways: Mapping[str, Way], rounds: int, device: str | torch.device = "cpu", warm: bool = True
) -> dict[str, list[float]]:
    """Measures the items per second of each way, once per round.

    Args:
        ways: Functions by name; each does its work and returns the number of items.
        rounds: Number of measurements per way. Every second round is reversed, so the predecessor of a way varies.
        device: Device that does the work; it is synchronized before the clock is read.
        warm: Whether each way first runs once without being measured.
    """
    rates: dict[str, list[float]] = {name: [] for name in ways}
    if warm:
        for way in ways.values():
            way()
    for turn in range(rounds):
        for name in list(ways)[:: 1 if turn % 2 == 0 else -1]:
            gc.collect()
            synchronize(device)
            start = time.perf_counter()
            items = ways[name]()
            synchronize(device)
            rates[name].append(items / (time.perf_counter() - start))
    return rates


def ratio(rates: Mapping[str, list[float]], fast: str, slow: str) -> float:
    """Returns the speedup of `fast` over `slow`: the median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(rates[fast], rates[slow], strict=True))


def medians(rates: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """Returns median, minimum and maximum of each way's figures."""
    return {
        name: {"median": rounded(statistics.median(x)), "least": rounded(min(x)), "most": rounded(max(x))}
        for name, x in rates.items()
    }


def rounded(x: float) -> float:
    """Rounds to four significant digits."""
    return float(f"{x:.4g}")
