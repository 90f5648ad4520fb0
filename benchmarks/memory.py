"""Peak memory of a process, and what autograd keeps."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")


def resident_mb(kind: str = "RssAnon", process: int | str = "self") -> float:
    """MB that a process holds now (Linux). ``RssAnon`` leaves mapped files out, which the system may drop at any time;
    ``RssShmem`` is what processes share, such as a worker's batches."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) / 1e3
    return 0.0


def private_mb(process: int) -> float:
    """MB that belong to one process alone (Linux): what a fork shares with its parent is left out."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1e3


class PeakMemory(threading.Thread):
    """Highest anonymous memory of this process while it runs, MB, above what it held at the start."""

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
    """What `work` returns, and the MB that it took at most: allocated on a GPU, resident elsewhere."""
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
    """Result of `forward()`, and the bytes of the distinct storages that its graph keeps, parameters left out."""
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
