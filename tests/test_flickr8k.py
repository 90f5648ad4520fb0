"""Base model on real photos, compared with clip_benchmark. Needs ../shared (see support/repository.py)."""

import json

import pytest
import torch
from clip_benchmark.datasets.builder import build_dataset
from clip_benchmark.metrics import zeroshot_retrieval
from clip_benchmark.webdataset_builder import convert_retrieval_dataset, path_to_bytes
from PIL import Image
from support.commands import arguments
from support.foreign_tars import img2dataset
from support.repository import ROOT, launcher
from support.tars import tar_of
from torch.utils.data import DataLoader, Dataset

import amp
from amp.data.conversion.make import make_shards
from amp.data.conversion.tars import index_shards
from amp.data.split import ShardSplit
from amp.files import sha256_of


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


@pytest.fixture(scope="module")
def clip_benchmark_shards(flickr8k, tmp_path_factory):
    """The 1,000 test photos as CLIP_benchmark's own tool writes them: (folder of test/0.tar to 3.tar, records)."""
    folder = tmp_path_factory.mktemp("clip_benchmark")
    records = [
        record
        for record in json.loads((flickr8k / "dataset_flickr8k.json").read_text())["images"]
        if record["split"] == "test"
    ]
    pairs = [(str(flickr8k / "images" / r["filename"]), [s["raw"] for s in r["sentences"]]) for r in records]
    convert_retrieval_dataset(pairs, "test", str(folder), transform=path_to_bytes, max_count=300, verbose=False)
    return folder, records


def read_all(root):
    """Photo and captions with their knowledge of each sample of split test, in order."""
    split = ShardSplit(root, "test")
    return [split.decoded(n, bytes) for n in range(len(split))], [
        [{key: value for key, value in caption.items() if key != "id"} for caption in record["captions"]]
        for record in split.records()
    ]


@pytest.mark.slow
def test_clip_benchmark_shards_give_its_own_figures(
    flickr8k, clip_small, clip_benchmark_shards, tmp_path, fresh_accelerate
):
    folder, _ = clip_benchmark_shards
    before = [sha256_of(path) for path in sorted((folder / "test").glob("*.tar"))]
    run = launcher("tools/index_shards.py").main
    run(arguments({"shards": folder / "test/{0..3}.tar", "split": "test", "workers": "1", "out": tmp_path / "side"}))
    launcher("amp/commands/evaluate.py").main(
        arguments(
            {
                "config": ROOT / "launchers/configs/flickr8k.yaml",
                "model.name": clip_small,
                "shards": tmp_path / "side",
                "cache": tmp_path / "cache",
                "workers": "0",
                "split": "test",
                "out": tmp_path / "base.json",
            }
        )
    )
    ours = json.loads((tmp_path / "base.json").read_text())["rows"][0]
    assert [sha256_of(path) for path in sorted((folder / "test").glob("*.tar"))] == before

    model, _, preprocess = amp.create_model_and_transforms(clip_small, image_resize_mode="squash")
    dataset = build_dataset(
        "wds/flickr8k", root=str(folder), transform=preprocess, split="test", task="zeroshot_retrieval"
    )
    loader = DataLoader(dataset.batched(64), batch_size=None)  # as its command line does
    theirs = zeroshot_retrieval.evaluate(
        model.backbone.clip, loader, amp.get_tokenizer(clip_small), "cpu", amp=False, recall_k_list=[1, 5, 10]
    )
    for k in (1, 5, 10):
        figures = (ours["t2i"]["recall"][f"R@{k}"], ours["i2t"]["recall"][f"R@{k}"])
        expected = (100 * theirs[f"image_retrieval_recall@{k}"], 100 * theirs[f"text_retrieval_recall@{k}"])
        print(f"R@{k}: ours {figures}, CLIP_benchmark's {expected}")
        assert figures == pytest.approx(expected, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["clip_benchmark", "img2dataset"])
def test_a_thousand_photos_on_both_roads(flickr8k, clip_benchmark_shards, tmp_path, tool):
    """Photos, captions and knowledge are those of make_shards on the same captions file."""
    folder, records = clip_benchmark_shards
    folder = folder / "test"
    captions = [[s["raw"] for s in record["sentences"]] for record in records]
    if tool == "img2dataset":  # one caption per photo
        captions, folder = [texts[:1] for texts in captions], tmp_path / "tars"
        folder.mkdir()
        photos = [(flickr8k / "images" / record["filename"]).read_bytes() for record in records]
        for start in range(0, len(photos), 400):
            samples = [img2dataset(n, photos[n], captions[n][0]) for n in range(start, min(start + 400, len(photos)))]
            tar_of(folder / f"{start // 400:05d}.tar", *(member for sample in samples for member in sample))
    known = {}
    for line in (flickr8k / "knowledge.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        known[record.pop("sentid")] = record
    rows, lines = [], []
    for record, texts in zip(records, captions, strict=True):
        rows.append({"image": record["filename"], "captions": texts, "split": "test"})
        for sentence in record["sentences"][: len(texts)]:
            knowledge = {key: known[sentence["sentid"]][key] for key in ("triplets", "states")}
            lines.append({"sentid": len(lines), "caption": sentence["raw"], **knowledge})
    for name, content in (("captions", rows), ("knowledge", lines)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in content))
    knowledge = str(tmp_path / "knowledge.jsonl")
    options = {"knowledge": knowledge, "workers": 1}
    make_shards(str(tmp_path / "captions.jsonl"), str(flickr8k / "images"), str(tmp_path / "own"), **options)
    make_shards(str(folder), None, str(tmp_path / "converted"), split="test", **options)
    index_shards(str(folder), split="test", out=str(tmp_path / "side"), **options)
    own, converted, indexed = (read_all(tmp_path / name) for name in ("own", "converted", "side"))
    assert converted == indexed and len(converted[0]) == 1000
    pairs = [sorted(zip(photos, map(json.dumps, texts), strict=True)) for photos, texts in (own, converted)]
    assert pairs[0] == pairs[1] and sum(bool(c["triplets"]) for texts in own[1] for c in texts) > 500
