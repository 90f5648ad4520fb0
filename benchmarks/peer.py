"""Runs open_clip_train's WebDataset pipeline in a separate interpreter, one epoch per line on standard input.

It imports nothing of this project, because its environment has webdataset 0.2.86.
"""

import json
import multiprocessing
import sys
from argparse import Namespace
from pathlib import Path

import open_clip
import torch
from open_clip.transform import image_transform
from open_clip_train.data import get_wds_dataset


def private_mb(process: int) -> float:
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1e3


def main(given: dict) -> None:
    torch.set_num_threads(1)
    arguments = Namespace(
        train_data=given["tars"],
        val_data=None,
        train_num_samples=given["images"],
        dataset_resampled=False,
        train_data_upsampling_factors=None,
        seed=0,
        batch_size=given["batch_size"],
        workers=given["workers"],
        world_size=1,
    )
    transform = image_transform(given["size"], is_train=True)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    data = get_wds_dataset(arguments, transform, is_train=True, floor=True, tokenizer=tokenizer)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loader, epoch = data.dataloader, 0
    workers = []
    for line in sys.stdin:
        if line.strip() == "end":
            return
        if line.strip() == "memory":
            answer = {"worker_MB": max(private_mb(worker.pid) for worker in workers)}
        else:
            data.set_epoch(epoch)
            epoch += 1
            images = 0
            for batch, _ in loader:
                images += len(batch.to(device, non_blocking=True))
            workers = multiprocessing.active_children()
            answer = {"images": images}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
