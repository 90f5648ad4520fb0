"""Base model on real photos, compared with clip_benchmark. Needs ../shared (see support/repository.py)."""

import json

import pytest
import torch
from clip_benchmark.metrics import zeroshot_retrieval
from PIL import Image
from support.commands import arguments
from support.repository import ROOT, launcher
from torch.utils.data import DataLoader, Dataset

import amp


class Photos(Dataset):
    """Test photos and captions, read from the Karpathy file and the image folder instead of shards."""

    def __init__(self, folder, preprocess):
        records = json.loads((folder / "dataset_flickr8k.json").read_text())["images"]
        self.records = [r for r in records if r["split"] == "test"]
        self.folder, self.preprocess = folder, preprocess

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        record = self.records[index]
        image = Image.open(self.folder / "images" / record["filename"]).convert("RGB")
        return self.preprocess(image), [s["raw"] for s in record["sentences"]]


def collate(samples):
    images, texts = zip(*samples, strict=True)
    return torch.stack(images), list(texts)


@pytest.mark.slow
def test_base_row_equals_clip_benchmark(flickr8k, clip_small, tmp_path, fresh_accelerate):
    shards, out = tmp_path / "shards", tmp_path / "base.json"
    launcher("tools/make_shards.py").main(
        arguments(
            {
                "captions": flickr8k / "dataset_flickr8k.json",
                "images": flickr8k / "images",
                "out": shards,
                "splits": "test",
                "workers": "1",
            }
        )
    )
    launcher("amp/commands/evaluate.py").main(
        arguments(
            {
                "config": ROOT / "launchers/configs/flickr8k.yaml",
                "model.name": clip_small,
                "shards": shards,
                "cache": tmp_path / "cache",
                "workers": "0",
                "split": "test",
                "out": out,
            }
        )
    )
    ours = json.loads(out.read_text())["rows"][0]

    model, _, preprocess = amp.create_model_and_transforms(clip_small, image_resize_mode="squash")
    loader = DataLoader(Photos(flickr8k, preprocess), 64, collate_fn=collate)
    theirs = zeroshot_retrieval.evaluate(
        model.backbone.clip, loader, amp.get_tokenizer(clip_small), "cpu", amp=False, recall_k_list=[1, 5, 10]
    )
    for k in (1, 5, 10):
        assert ours["t2i"]["recall"][f"R@{k}"] == pytest.approx(100 * theirs[f"image_retrieval_recall@{k}"], abs=0.01)
        assert ours["i2t"]["recall"][f"R@{k}"] == pytest.approx(100 * theirs[f"text_retrieval_recall@{k}"], abs=0.01)
