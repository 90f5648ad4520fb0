"""Runs functions in several processes joined over gloo, and resets Accelerate's state in this process."""

import gc
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist


def run_ranks(function: Callable, folder: Path, *arguments, world: int = 2) -> list:
    """Calls function(*arguments) in `world` processes joined over gloo; returns their results in rank order.

    The processes are forked from a server that has imported torch and open_clip once for all tests.
    """
    context = multiprocessing.get_context("forkserver")
    folder.mkdir(parents=True, exist_ok=True)
    ranks = [context.Process(target=_rank, args=(function, rank, world, folder, arguments)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=300)
    hung = [process for process in ranks if process.is_alive()]
    for process in hung:
        process.kill()
    codes = [process.exitcode for process in ranks]
    assert not hung and codes == [0] * world, f"ranks ended with {codes}, {len(hung)} of them hung"
    return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(function, rank, world, folder, arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.save(function(*arguments), folder / f"result-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def forget_accelerate() -> None:
    """Resets the state that Accelerate keeps in the process.

    Also excludes existing objects from garbage collection until a training run ends: it begins with two collections,
    which would visit the imports of all tests.
    """
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    gc.freeze()
