"""Start-up of a training run on splits of growing size: time to the first batch, and memory.

    python -m benchmarks.startup --out results/startup.json

The splits are synthetic: records of five captions with one triplet each, in the form of `amp index_shards`. All tar
files are links to one file of tiny photos, and the text features are random, because computing them is not measured
here but by `--prepare`, which computes the features of a small split by one and by two processes.
"""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from amp.errors import exit_on_error, require

with exit_on_error():
    import numpy as np
    from jsonargparse import auto_cli

    from amp.data.captions.base import Caption, CaptionedImage
    from amp.data.shard_texts import ShardTexts
    from amp.data.shards import ShardInfo, ShardManifest
    from amp.data.shards.index import index_bytes, index_of, records_of, side_file
    from amp.data.shards.record import record_bytes
    from amp.data.shards.tar import HashedFile, add_member, end_archive
    from amp.data.shared_work import make_missing
    from amp.data.text_features import write_segment
    from amp.files import write_atomically
    from amp.knowledge.schema import Triplet
    from amp.knowledge.text import state_text
    from benchmarks.memory import resident_mb

    psutil = require("psutil", "this benchmark")

MODEL = "local-dir:tools/scenes/micro-clip"
SHARD, CAPTIONS, BATCH = 1_000, 5, 128


def main(
    samples: list[int] = [10_000, 100_000, 2_000_000],  # noqa: B006
    prepared: int = 8_000,
    rounds: int = 3,
    out: Path = Path("runs/startup.json"),
    folder: Path | None = None,
) -> None:
    """Measures start-up and preparation.

    Args:
        samples: Sizes of the splits.
        prepared: Size of the split whose features are computed; 0 skips this.
        rounds: Number of runs per size; the median is reported.
        out: File of the figures.
        folder: Folder of the splits, which is kept; a temporary folder by default.
    """
    found: dict = {"start": [], "prepare": {}}
    with tempfile.TemporaryDirectory() as temporary:
        root = folder or Path(temporary)
        for count in samples:
            if not (root / f"{count}" / "shards" / "manifest.json").exists():
                make_split(root / f"{count}", count)
        runs: dict[int, list[dict]] = {count: [] for count in samples}
        for _ in range(rounds):  # in turns, so that a change of the machine's speed affects all sizes
            for count in samples:
                runs[count].append(started(root / f"{count}"))
        for count, rows in runs.items():
            row = {key: float(np.median([run[key] for run in rows])) for key in rows[0]}
            found["start"].append({"samples": count, "shards": count // SHARD, **row})
            print(json.dumps(found["start"][-1]), flush=True)
        if prepared:
            shutil.rmtree(root / "prepare", ignore_errors=True)
            make_split(root / "prepare", prepared, features=False)
            found["prepare"] = preparation(root / "prepare", prepared)
    write_atomically(out, (json.dumps(found, indent=1) + "\n").encode())
    print(json.dumps(found["prepare"]))


def make_split(folder: Path, count: int, features: bool = True) -> None:
    """Writes the shards of a split, and random features of its texts."""
    shards = folder / "shards"
    shards.mkdir(parents=True, exist_ok=True)
    photos = shards / "photos.tar"
    spans = write_photos(photos)
    tar = side_file(photos.read_bytes())
    model = text_tower() if features else None
    infos = []
    for number in range(count // SHARD):
        path = shards / f"train-{number:06d}.tar"
        path.unlink(missing_ok=True)
        os.link(photos, path)
        lines, states = [], []
        for row in range(SHARD):
            sample = number * SHARD + row
            captions = []
            for i in range(CAPTIONS):
                triplet = Triplet("dog", f"jumps {sample}-{i}", "fence")
                state = f"the dog of photo {sample} is in the air {i}"
                knowledge = {"triplets": [vars_of(triplet)], "states": [state]}
                captions.append(
                    Caption(sample * CAPTIONS + i, f"a dog {i} jumps in photo {sample}", json.dumps(knowledge))
                )
                states.append(state_text(triplet, state))
            lines.append(
                record_bytes(f"{sample}", CaptionedImage(f"{sample}.jpg", f"{sample}.jpg", sample, "train", captions))
            )
        ends = np.cumsum([len(line) + 1 for line in lines])
        index = index_bytes([(s, (int(e) - len(x) - 1, len(x))) for s, e, x in zip(spans, ends, lines, strict=True)])
        records = b"\n".join(lines) + b"\n"
        records_of(path).write_bytes(records)
        index_of(path).write_bytes(index)
        infos.append(
            ShardInfo(path, SHARD, SHARD * CAPTIONS, tar.bytes, tar.sha256, side_file(index), side_file(records))
        )
        if model is not None:
            texts = ShardTexts(folder / "cache", *model, "float16", "both")
            captions = [
                f"a dog {i} jumps in photo {number * SHARD + row}" for row in range(SHARD) for i in range(CAPTIONS)
            ]
            random = np.random.default_rng(number)
            for name, found in zip(texts.names(infos[-1]), (captions, states), strict=True):
                write_segment(
                    texts.folder / name, found, random.random((len(found), model[1]), np.float32).astype("f2")
                )
    ShardManifest(shards, {"train": infos}, {"train": 0}).save()
    photos.unlink()


def vars_of(triplet: Triplet) -> dict:
    return {"subject": triplet.subject, "action": triplet.action, "object": triplet.object, "kind": "action"}


def write_photos(path: Path) -> list[tuple[int, int]]:
    """Writes a tar file of `SHARD` tiny photos; returns where they are."""
    import io

    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (72, 72, 3), np.uint8)).save(content, "JPEG", quality=50)
    with open(path, "wb") as file:
        hashed = HashedFile(file)
        spans = [add_member(hashed, f"{i:06d}.jpg", content.getvalue()) for i in range(SHARD)]
        end_archive(hashed)
    return spans


def text_tower() -> tuple[str, int]:
    """Hash of the text tower's weights, and its width."""
    import amp

    model, *_ = amp.create_model_and_transforms(MODEL)
    return model.backbone.weights_hash("text"), model.backbone.embed_dim


def started(folder: Path) -> dict:
    """Starts a run in a new process up to its first batch."""
    code = f"from benchmarks.startup import first_batch; first_batch({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def first_batch(folder: str) -> None:
    """Opens the data as a training run does, reads the first batch, and prints seconds and MB."""
    import amp
    from amp.train.config import DataSettings, ModelSettings, TrainConfig
    from amp.train.launch import make_accelerator
    from amp.train.run import Run, open_splits
    from amp.train.stopping import StopRequest

    data = DataSettings(f"{folder}/shards", val_split=None, batch_size=BATCH, workers=0, augment="none")
    data.cache, data.cache_dtype = f"{folder}/cache", "float16"
    config = TrainConfig(f"{folder}/run", ModelSettings(MODEL, None), data=data, trackers=[], mixed_precision="no")
    model, *transforms = amp.create_model_and_transforms(MODEL, prompt_config=config.prompt)
    loaded, before = time.perf_counter(), resident_mb()
    run = Run(config, make_accelerator(config), StopRequest())
    run.split, _ = open_splits(config)
    opened, opened_mb = time.perf_counter(), resident_mb()
    run.model = model
    run.prepare_data(None, *transforms)
    batch = run.to_device(next(iter(run.loader)))
    assert len(batch.images) == BATCH
    end = time.perf_counter()
    found = {
        "seconds": time.time() - psutil.Process().create_time(),
        "data_seconds": end - loaded,
        "manifest_seconds": opened - loaded,
        "MB": resident_mb(),
        "manifest_MB": opened_mb - before,
    }
    print(json.dumps(found))


def preparation(folder: Path, count: int) -> dict:
    """Captions per second that one and two processes prepare, and the shares of 64 processes."""
    found = {}
    context = multiprocessing.get_context("spawn")
    for world in (1, 2):
        cache = folder / f"cache-{world}"
        ready, go = context.Barrier(world + 1), context.Barrier(world + 1)
        processes = [
            context.Process(target=prepare, args=(folder, cache, rank / world, ready, go)) for rank in range(world)
        ]
        for process in processes:
            process.start()
        ready.wait()
        begin = time.perf_counter()
        go.wait()
        for process in processes:
            process.join()
        found[str(world)] = {"captions_per_second": count * CAPTIONS / (time.perf_counter() - begin)}
    return {**found, "simulated": simulated()}


def simulated(workers: int = 64, items: int = 1_000, seconds: float = 1.0) -> dict:
    """Shares items among threads that only sleep. Returns the time relative to an even division of the items."""
    with tempfile.TemporaryDirectory() as folder:

        def make(name: str) -> None:
            time.sleep(seconds)
            (Path(folder) / name).touch()

        names = [f"item-{number}" for number in range(items)]
        begin = time.perf_counter()
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(lambda worker: make_missing(names, Path(folder), make, worker / workers), range(workers)))
        found = time.perf_counter() - begin
    return {"processes": workers, "items": items, "time_over_even_division": found / (items * seconds / workers)}


def prepare(folder: Path, cache: Path, first: float, ready, go) -> None:
    """Computes the text features of a split, together with other processes."""
    import torch

    import amp
    from amp.data.prepare import prepare_shard_texts
    from amp.data.split import ShardSplit
    from amp.terminal import Terminal

    torch.set_num_threads(1)
    model, *_ = amp.create_model_and_transforms(MODEL)
    split = ShardSplit(folder / "shards", "train")
    ready.wait()
    go.wait()
    prepare_shard_texts(Terminal(False), split, model, str(cache), "float16", first)


if __name__ == "__main__":
    with exit_on_error():
        auto_cli(main, as_positional=False)
