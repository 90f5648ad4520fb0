"""Measures a training step of each way of conditioning: pairs, time and memory kept for the backward pass.

    python tools/measure_step.py --model.name ViT-B-16-quickgelu --model.pretrained openai --prompt.interaction_layer 9
    python tools/measure_step.py --config launchers/configs/flickr8k.yaml --out results/step_flickr8k.csv

Images and knowledge are random, of the sizes that the configuration names; nothing is read from shards. Memory is
what autograd keeps between the forward and the backward pass, parameters left out: the part that grows with the batch.
"""

import csv
import io
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table

from amp.config import PromptConfig
from amp.data.stream import Batch
from amp.errors import exit_on_error
from amp.factory import create_model_and_transforms
from amp.knowledge.batch import KnowledgeBatch
from amp.model import ActionAwareCLIP
from amp.retrieval.results import write_atomically
from amp.train.command import command_line, read_command_line
from amp.train.config import ModelSettings
from amp.train.objective import Objective
from amp.train.stages import set_trainable

COLUMNS = ("conditioning", "interaction", "m", "conditioned_pairs", "seconds", "kept_MB")


@dataclass
class Measurement:
    """What is measured.

    Args:
        step_batch: Images.
        values_of_m: Values of m, the negatives a direction of ``contrastive`` with ``aim``.
        repeats: Steps a setting; the median time is shown.
        device: Where; autocast bf16 everywhere.
        out: CSV file; null only prints.
    """

    step_batch: int = 64
    values_of_m: list[int] = field(default_factory=lambda: [1, 2, 3, 4])
    repeats: int = 3
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    out: Path | None = None


def random_batch(model: ActionAwareCLIP, size: int, device: torch.device) -> Batch:
    """Early tokens, captions and full knowledge of `size` different images."""
    backbone, k, s = model.backbone, model.config.max_triplets, model.config.slot_tokens
    knowledge = KnowledgeBatch(
        torch.randint(1000, (size, k, 3, s)), torch.ones(size, k, 3, s, dtype=torch.bool),
        torch.randn(size, k, backbone.embed_dim), torch.ones(size, k, dtype=torch.bool),
    )  # fmt: skip
    early = torch.randn(size, 1 + backbone.num_patches, backbone.vision_width)
    features = torch.randn(2, size, backbone.embed_dim)
    return Batch(early, features[0], features[1], knowledge, torch.arange(size)).to(device)


def kept_bytes(model: ActionAwareCLIP, forward) -> tuple[torch.Tensor, int]:
    """Result of `forward()`, and the bytes of the distinct storages that its graph keeps."""
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


def measure(model: ActionAwareCLIP, objective: Objective, batch: Batch, repeats: int) -> tuple[float, float]:
    """Median seconds of forward and backward, and MB kept between them."""
    set_trainable(model, objective.stage)
    times, kept = [], 0
    for step in range(repeats + 1):  # the first warms up
        if batch.images.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()

        def forward(step=step):
            with torch.autocast(batch.images.device.type, torch.bfloat16):
                return objective(model, batch, step)[0]

        # Counted in the first step alone: hooks take time.
        loss, counted = kept_bytes(model, forward) if step == 0 else (forward(), 0)
        loss.backward()
        if batch.images.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        kept = kept or counted
        model.zero_grad()
    return statistics.median(times[1:]), kept / 1e6


def rows(settings: Measurement, model: ModelSettings, prompt: PromptConfig):
    """One row a setting: see `COLUMNS`."""
    device, n = torch.device(settings.device), settings.step_batch
    cases = [("none", "aim", 0, 0), ("paired", "aim", 0, n)]
    cases += [("contrastive", "aim", m, n * (1 + 2 * m)) for m in settings.values_of_m]
    cases += [("contrastive", "readout", 0, n * n)]
    base, _, _ = create_model_and_transforms(model.name, model.pretrained, precision=model.precision, device=device)
    for conditioning, interaction, m, pairs in cases:
        torch.manual_seed(0)
        config = replace(prompt, interaction=interaction, knowledge="none" if conditioning == "none" else "both")
        aware = ActionAwareCLIP(base.backbone.clip, config, base.tokenizer).to(device)
        objective = Objective(1, conditioning, max(1, m), all_pairs=interaction == "readout")
        seconds, kept = measure(aware, objective, random_batch(aware, n, device), settings.repeats)
        yield conditioning, interaction, m or "", pairs, f"{seconds:.3f}", f"{kept:.2f}"


def parser() -> ArgumentParser:
    return command_line("tools/measure_step.py", __doc__, Measurement)


def main(arguments: list[str] | None = None) -> None:
    with exit_on_error():
        measurement, config = read_command_line(parser(), arguments, Measurement)
        model, prompt = config.model, config.prompt
        table = Table(*COLUMNS, title=f"{model.name}, {measurement.step_batch} images, one step")
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in rows(measurement, model, prompt):
            writer.writerow(row)
            table.add_row(*map(str, row))
        if measurement.out is not None:
            write_atomically(measurement.out, out.getvalue().encode())
        Console().print(table)


if __name__ == "__main__":
    main()
