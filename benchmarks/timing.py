"""Ways to do the same work, timed in turns, so that a machine that slows down slows them all."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping

import torch

Way = Callable[[], int]


def synchronize(device: str | torch.device = "cpu") -> None:
    """Waits for the work that was handed to a GPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def in_turns(
    ways: Mapping[str, Way], rounds: int, device: str | torch.device = "cpu", warm: bool = True
) -> dict[str, list[float]]:
    """Items a second of each way, one figure a round.

    Args:
        ways: By name; each does its work and returns how many items it did.
        rounds: How often each is done; every second round goes backwards, so that no way always follows the same one.
        device: Where the work is done; waited for before the clock is read.
        warm: Do each once before, unmeasured.
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
    """How many times as fast: the median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(rates[fast], rates[slow], strict=True))


def medians(rates: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median, least and most of each way's figures."""
    return {
        name: {"median": rounded(statistics.median(x)), "least": rounded(min(x)), "most": rounded(max(x))}
        for name, x in rates.items()
    }


def rounded(x: float) -> float:
    """To four digits."""
    return float(f"{x:.4g}")
