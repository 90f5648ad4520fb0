"""What a plan is made for."""

from dataclasses import dataclass

from amp.errors import AmpError


@dataclass
class PlanSettings:
    """What is planned for; giving one of them, or --plan alone, prints the plan instead of training.

    Args:
        nodes: Machines.
        gpus: Processes a machine, one a GPU.
        gpu_memory_gb: Memory of a GPU in GB of 10^9 bytes, to compare with; null compares nothing.
        verify: Read all shards and compare their sha256.
        images: Training images of a simulated dataset, which takes the place of the shards. What belongs to the
            machine (cores, disk, open files) is then printed and not compared.
        captions: Its captions; null takes 5 an image.
        shards: Its shards; null takes one a 1,000 images.
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
        """Processes over all machines."""
        return self.nodes * self.gpus
