"""Settings of `amp train --plan`."""

from dataclasses import dataclass

from amp.errors import AmpError


@dataclass
class PlanSettings:
    """Hardware and data of a plan. Giving any of them, or --plan alone, prints the plan instead of training.

    Args:
        nodes: Number of machines.
        gpus: Number of GPUs per machine; each has one process.
        gpu_memory_gb: Memory of one GPU in GB of 10^9 bytes, compared with the estimate; null compares nothing.
        verify: Read all shards and compare their sha256.
        images: Number of training images of a simulated dataset, used instead of the shards. Requirements of the
            machine (cores, disk, open files) are then printed and not checked.
        captions: Number of captions of the simulated dataset; null is 5 per image.
        shards: Number of shards of the simulated dataset; null is one per 1,000 images.
    """

    nodes: int = 1
    gpus: int = 1
    gpu_memory_gb: float | None = None
    verify: bool = False
    images: int | None = None
    captions: int | None = None
    shards: int | None = None

    def __post_init__(self):
        for key in ("nodes", "gpus", "gpu_memory_gb", "images", "captions", "shards"):
            value = getattr(self, key)
            if value is not None and value <= 0:
                raise AmpError(f"plan.{key} is {value}, expected a number above 0")
        for key in ("captions", "shards"):
            if getattr(self, key) is not None and self.images is None:
                raise AmpError(f"plan.{key} is given without plan.images, expected both; add --plan.images N")

    @property
    def world(self) -> int:
        """Number of processes on all machines."""
        return self.nodes * self.gpus
