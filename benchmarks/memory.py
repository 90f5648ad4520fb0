"""Measures peak memory of a process, and the memory that autograd keeps."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")


def resident_mb(kind: str = "RssAnon", process: int | str = "self") -> float:
    """Returns the resident memory of a process in MB (Linux only).

    Args:
        kind: `RssAnon` excludes mapped files, which the system may drop at any time. `RssShmem` is shared memory, such
            as a worker's batches.
        process: Process id, or "self".
    """
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) / 1e3
    return 0.0


def private_mb(process: int) -> float:
    """Returns the private memory of a process in MB (Linux only), without memory shared with its parent."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1e3


class PeakMemory(threading.Thread):
    """Thread that records the peak of this process's anonymous memory in MB, relative to its start."""

    def __init__(self):
        super().__init__(daemon=True)
        self.start_value, self.peak, self.ended = resident_mb(), 0.0, threading.Event()
        self.start()

    def run(self) -> None:
        while not self.ended.wait(0.005):
            self.peak = max(self.peak, resident_mb())

    def stop(self) -> float:
        self.ended.set()
        self.join()
        return max(0.0, self.peak - self.start_value)


def peak_mb(work: Callable[[], Result], device: str = "cpu") -> tuple[Result, float]:
    """Returns the result of `work` and its peak memory in MB: allocated on a GPU, resident elsewhere."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = work()
        return result, (torch.cuda.max_memory_allocated() - before) / 1e6
    memory = PeakMemory()
    try:
        return work(), memory.stop()
    finally:
        memory.ended.set()


def kept_bytes(model: torch.nn.Module, forward: Callable[[], Result]) -> tuple[Result, int]:
    """Returns the result of `forward()`, and the bytes that its graph keeps of storages other than parameters."""
    owned = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = forward()
    return result, sum(kept.values())
