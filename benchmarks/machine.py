"""Describes the machine of a run, with its peak speed of matrix products and copies."""

import os
import platform
from pathlib import Path

import torch

from benchmarks.timing import in_turns, rounded


def processor() -> str:
    """Returns the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def matmul_peak(device: str = "cpu", dtype: torch.dtype = torch.float32, size: int = 1024, rounds: int = 5) -> float:
    """Measures GFLOP/s of square matrix products (best round), the upper bound for a step."""
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    repeats = 100 if torch.device(device).type == "cuda" else 4

    def multiply() -> int:
        for _ in range(repeats):
            a @ b
        return repeats

    return rounded(max(in_turns({"": multiply}, rounds, device)[""]) * 2 * size**3 / 1e9)


def multiplies_bf16(device: str) -> bool:
    """Returns whether bf16 products are fast; on some processors they are a hundred times slower than in fp32."""
    return matmul_peak(device, torch.bfloat16, 256) > 0.2 * matmul_peak(device, size=256)


def copy_rate(megabytes: int = 256, rounds: int = 5) -> float:
    """Measures GB/s of memory that one thread reads and writes in a copy (best round)."""
    source = torch.ones(megabytes * 250_000)
    target = torch.empty_like(source)
    return rounded(max(in_turns({"": lambda: target.copy_(source).nbytes}, rounds)[""]) / 1e9)


def describe(device: str) -> dict:
    """Returns a description of the machine, which is stored with the figures."""
    found = {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device,
        "copy_GB_per_second": copy_rate(),
        "matmul_GFLOP_per_second": {
            "fp32": matmul_peak(device),
            "bf16": matmul_peak(device, torch.bfloat16, 1024 if multiplies_bf16(device) else 256),
        },
    }
    if torch.device(device).type == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found
