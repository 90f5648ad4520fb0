"""The machine of a run, and what it could do at best: matrix products and copies."""

import os
import platform
from pathlib import Path

import torch

from benchmarks.timing import in_turns, rounded


def processor() -> str:
    """The processor's name as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def matmul_peak(device: str = "cpu", dtype: torch.dtype = torch.float32, size: int = 1024, rounds: int = 5) -> float:
    """GFLOP/s of square matrix products, the best round: what a step could reach if it were nothing else."""
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    repeats = 100 if torch.device(device).type == "cuda" else 4

    def multiply() -> int:
        for _ in range(repeats):
            a @ b
        return repeats

    return rounded(max(in_turns({"": multiply}, rounds, device)[""]) * 2 * size**3 / 1e9)


def multiplies_bf16(device: str) -> bool:
    """Whether bf16 is worth a measurement: some processors multiply it a hundred times more slowly than fp32."""
    return matmul_peak(device, torch.bfloat16, 256) > 0.2 * matmul_peak(device, size=256)


def copy_rate(megabytes: int = 256, rounds: int = 5) -> float:
    """GB/s at which memory is read and written by one thread's copy, the best round."""
    source = torch.ones(megabytes * 250_000)
    target = torch.empty_like(source)
    return rounded(max(in_turns({"": lambda: target.copy_(source).nbytes}, rounds)[""]) / 1e9)


def describe(device: str) -> dict:
    """What stands beside every figure."""
    found = {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device,
        "copy_GB_a_second": copy_rate(),
        "matmul_GFLOP_a_second": {
            "fp32": matmul_peak(device),
            "bf16": matmul_peak(device, torch.bfloat16, 1024 if multiplies_bf16(device) else 256),
        },
    }
    if torch.device(device).type == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found
