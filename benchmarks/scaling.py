"""Scaling over ranks: one and two ranks measured, the data order of 64 simulated, and bounds for 8 GPUs calculated."""

import multiprocessing
import os
import time

import numpy as np
import open_clip
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from amp.data.order import BatchOrder
from amp.errors import AmpError
from amp.model.clip import ActionAwareCLIP
from amp.model.config import PromptConfig
from amp.train.objective import Objective
from amp.train.stages import set_trainable
from benchmarks.models import PLAIN, READ_LAST, base_model, build, random_batch
from benchmarks.settings import Settings
from benchmarks.step import gflop
from benchmarks.tables import listed, table
from benchmarks.timing import rounded

COCO_IMAGES, COCO_SHARD = 113_287, 1_000  # the Karpathy split's training images; make_shards' default
# Dense bf16 and memory bandwidth of an H100 SXM, from NVIDIA's data sheet. The share is an assumption, not measured.
H100_TFLOP, H100_GB, SHARE = 989.0, 3350.0, 0.4
ROOF_MODEL, ROOF_BATCH, ROOF_GPUS = "ViT-L-14-336", 64, 8


def run(settings: Settings) -> dict:
    """Measures real ranks, simulates the data order of 64 and calculates the roofline."""
    ranks = {str(world): real_ranks(settings, world) for world in (1, 2)}
    speedup = ranks["2"]["images_per_second"] / ranks["1"]["images_per_second"]
    return {"ranks": ranks, "two_over_one": rounded(speedup), "plan": plan_of(64), "roofline": roofline()}


def real_ranks(settings: Settings, world: int, **prompt) -> dict:
    """Measures images per second over all ranks, for training steps of `contrastive` with `readout`.

    Args:
        settings: Settings of the benchmarks; each rank has `step_batch` images per step.
        world: Number of ranks.
        **prompt: More settings of `PromptConfig`.
    """
    context = multiprocessing.get_context("spawn")
    queue, store = context.SimpleQueue(), dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [
        context.Process(target=_rank, args=(settings, prompt, rank, world, store.port, queue)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise AmpError(
            f"the {world} ranks ended with exit codes {[process.exitcode for process in processes]}, expected 0"
        )
    seconds = max(queue.get() for _ in range(world))
    return {"images_per_second": rounded(world * settings.step_batch / seconds), "seconds_per_step": rounded(seconds)}


def _rank(settings: Settings, prompt: dict, rank: int, world: int, port: int, queue) -> None:
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", store=store, rank=rank, world_size=world)
    base = base_model(settings)
    model = build(base, 3 * base.backbone.num_layers // 4, **READ_LAST, **prompt)
    set_trainable(model, 1)
    engine = DistributedDataParallel(model) if world > 1 else model
    batch, objective = random_batch(model, settings.step_batch), Objective(1, model.interaction)
    batch.image_ids += rank * settings.step_batch
    times = []
    for step in range(1 + settings.model_rounds):
        dist.barrier()
        start = time.perf_counter()
        objective(engine, batch, step)[0].backward()
        model.zero_grad()
        times.append(time.perf_counter() - start)
    queue.put(float(np.median(times[1:])))
    dist.destroy_process_group()


def plan_of(world: int, images: int = COCO_IMAGES, batch: int = 64, window: int = 64) -> dict:
    """Simulates the samples that `world` ranks read in an epoch, with the order that the stream uses."""
    sizes = [COCO_SHARD] * (images // COCO_SHARD) + ([images % COCO_SHARD] if images % COCO_SHARD else [])
    starts = np.concatenate([[0], np.cumsum(sizes)])
    seen, counts, opened, in_batch = [], [], [], []
    for rank in range(world):
        order = BatchOrder(sizes, batch, rank, world, seed=0, window=window)
        samples = np.array([[index for index, _ in step] for step in order])
        shards = np.searchsorted(starts, samples, side="right") - 1
        seen.append(samples.ravel())
        counts.append(len(samples))
        opened.append(len(np.unique(shards)))
        in_batch += [len(np.unique(row)) for row in shards]
    together = np.concatenate(seen)
    return {
        "ranks": world,
        "images": images,
        "shards": len(sizes),
        "batch": batch,
        "steps": counts[0],
        "ranks_with_as_many_steps": sum(count == counts[0] for count in counts),
        "read_twice": len(together) - len(np.unique(together)),
        "left_out": images - len(together),
        "shards_opened_per_rank": max(opened),
        "shards_in_a_batch": rounded(np.mean(in_batch)),
        "reads_per_image": 2,
    }


def roofline() -> dict:
    """Calculates bounds of a step on 8 x H100: matrix products at an assumed share of the peak, and communication.

    Operations are counted on meta tensors. Nothing is measured.
    """
    with torch.device("meta"):
        clip = open_clip.create_model(ROOF_MODEL, None, load_weights=False, device="meta")
        layer = 3 * len(clip.visual.transformer.resblocks) // 4
        model = ActionAwareCLIP(clip, PromptConfig(**{**PLAIN, **READ_LAST, "depth": 0.75}))
        set_trainable(model, 1)
        batch = random_batch(model, ROOF_BATCH)
        objective = Objective(1, model.interaction)
        late = gflop(lambda: objective(model, batch, 0)[0].backward()) / 1e3
        images = torch.empty(ROOF_BATCH, 3, *model.backbone.visual.image_size)
        early = gflop(lambda: model.tower.early(images)) / 1e3
    seconds = (early + late) / (H100_TFLOP * SHARE)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    stored = batch.images.numel() * 2  # early tokens in float16, read instead of computed
    return {
        "model": ROOF_MODEL,
        "layer": layer,
        "images_per_gpu": ROOF_BATCH,
        "gpus": ROOF_GPUS,
        "assumed_TFLOP_per_second": H100_TFLOP,
        "assumed_share": SHARE,
        "TFLOP_early": rounded(early),
        "TFLOP_late": rounded(late),
        "ms_per_step": rounded(1e3 * seconds),
        "images_per_second": rounded(ROOF_GPUS * ROOF_BATCH / seconds),
        "trained_parameters": trained,
        "MB_of_gradients_exchanged": rounded(4e-6 * trained),
        "MB_of_stored_tokens_per_step": rounded(stored / 1e6),
        "ms_with_stored_tokens": rounded(1e3 * late / (H100_TFLOP * SHARE)),
    }


def ranks(figures: dict) -> list[str]:
    return table(
        ["ranks", "images/s", "seconds per step"],
        ([n, x["images_per_second"], x["seconds_per_step"]] for n, x in figures["ranks"].items()),
    )


TABLES = {"scaling": ranks, "scaling.plan": listed("plan"), "scaling.roofline": listed("roofline")}
