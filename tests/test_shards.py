"""Shards: writing, reading with our reader and with plain WebDataset, resuming, and errors for damaged shards."""

import hashlib
import io
import json
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import tarfile
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.repository import SHARED, run_here
from support.tars import tar_of

from amp.data.conversion import write
from amp.data.conversion.folder import lock_folder
from amp.data.conversion.make import make_shards
from amp.data.images.file import Resize, read_image, read_limited
from amp.data.images.formats import UnreadableImageError
from amp.data.shards import ShardInfo, ShardManifest, ShardReader
from amp.data.shards.index import index_of, side_file
from amp.errors import AmpError
from amp.terminal import PlainConsole

FLICKR8K = SHARED / "data" / "flickr8k"


def photo(path, seed=0, size=(32, 24), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


class DataSet:
    """Photos on disk, a JSONL file with their captions, and the conversion under test."""

    def __init__(self, root):
        self.root = root
        self.images = root / "images"
        self.out = root / "out"
        self.rows = []
        self.knowledge = []

    def add(self, name, split="train", captions=("A man runs", "A dog sleeps"), seed=None, **options):
        photo(self.images / name, len(self.rows) if seed is None else seed, **options)
        self.rows += [{"image": name, "caption": caption, "split": split} for caption in captions]

    def know(self, image, caption, *states):
        triplets = [{"subject": "man", "action": "runs", "object": "", "kind": "action"}] * len(states)
        self.knowledge.append({"image": image, "caption": caption, "triplets": triplets, "states": list(states)})

    def make(self, **options):
        captions = self.root / "captions.jsonl"
        captions.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        if self.knowledge:
            options["knowledge"] = str(self.root / "knowledge.jsonl")
            Path(options["knowledge"]).write_text("".join(json.dumps(record) + "\n" for record in self.knowledge))
        options = {"workers": 1, "samples_per_shard": 4, **options}
        return make_shards(str(captions), str(self.images), str(self.out), **options)

    def tars(self):
        """Name -> (mtime, sha256); a shard that is written again has a new mtime even if its bytes are equal."""
        return {
            path.name: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
            for path in sorted(self.out.glob("*.tar"))
        }


@pytest.fixture
def data(tmp_path):
    return DataSet(tmp_path)


@pytest.fixture
def ten(data):
    for n in range(10):
        data.add(f"{n}.jpg")
    data.add("test.png", "test")
    return data


def everything(manifest, split):
    """key -> (image bytes, record), over all shards of a split."""
    found = {}
    for shard in manifest.split(split):
        with ShardReader(shard.path) as reader:
            assert len(reader) == len(reader.keys) == shard.samples
            for i, key in enumerate(reader.keys):
                found[key] = reader.read(i)
    return found


# Writing and reading back


@pytest.mark.parametrize(("on_disk", "in_files"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_names_match_in_composed_and_decomposed_unicode(data, on_disk, in_files):
    """macOS decomposes file names, but names in captions, knowledge and lists are usually composed."""
    folder, first, second = "Straßenfest Zürich", "é 강아지.jpg", "が.png"
    for n, name in enumerate((first, second)):
        photo(data.images / unicodedata.normalize(on_disk, f"{folder}/{name}"), n)
    paths = [unicodedata.normalize(in_files, f"{folder}/{name}") for name in (first, second)]
    other = unicodedata.normalize(on_disk, paths[0])  # the same name in both forms
    rows = [(paths[0], "A man runs"), (other, "A dog sleeps"), (paths[1], "A cat jumps")]
    data.rows = [{"image": image, "caption": caption, "split": "train"} for image, caption in rows]
    data.know(other, "A man runs", "He leans forward")
    manifest = data.make()
    samples = everything(manifest, "train")
    assert not any(manifest.skipped.values())
    assert sorted(len(record["captions"]) for _, record in samples.values()) == [1, 2]
    assert manifest.captions_without_knowledge == {"train": 2}
    names = data.root / "names.txt"
    names.write_text(other)
    samples = everything(data.make(exclude_images=str(names)), "train")
    assert [record["captions"][0]["text"] for _, record in samples.values()] == ["A cat jumps"]


def test_round_trip(data):
    long = " ".join(f"word{n}" for n in range(500))
    data.add("COCO_val2014_000000391895.JPG", captions=("A man runs", long))
    data.add("folder/two.dots.png", captions=("\u00e4\u2028 'quoted'",))
    data.know("COCO_val2014_000000391895.JPG", long, "He leans forward", "Legs apart")
    manifest = data.make()
    samples = everything(manifest, "train")
    assert set(samples) == {"COCO_val2014_000000391895", "two_dots"}
    image, record = samples["COCO_val2014_000000391895"]
    assert image == (data.images / "COCO_val2014_000000391895.JPG").read_bytes()
    triplet = {"subject": "man", "action": "runs", "object": "", "kind": "action"}
    assert record == {
        "schema": 1,
        "key": "COCO_val2014_000000391895",
        "image_id": "COCO_val2014_000000391895.JPG",
        "filename": "COCO_val2014_000000391895.JPG",
        "split": "train",
        "captions": [
            {"id": 0, "text": "A man runs", "triplets": [], "states": []},
            {"id": 1, "text": long, "triplets": [triplet] * 2, "states": ["He leans forward", "Legs apart"]},
        ],
    }
    image, record = samples["two_dots"]
    assert image == (data.images / "folder/two.dots.png").read_bytes()
    assert record["filename"] == "folder/two.dots.png"
    assert record["captions"][0]["text"] == "\u00e4\u2028 'quoted'"
    assert manifest.captions_without_knowledge == {"train": 2}
    assert (manifest.samples("train"), manifest.captions("train")) == (2, 3)


def test_plain_webdataset_reads_the_same(ten):
    webdataset = pytest.importorskip("webdataset")
    manifest = ten.make()
    for split in manifest.splits:
        expected = everything(manifest, split)
        urls = [str(shard.path) for shard in manifest.split(split)]
        seen = {}
        for sample in webdataset.WebDataset(urls, shardshuffle=False):
            image = next(sample[extension] for extension in ("jpg", "png") if extension in sample)
            seen[sample["__key__"]] = (image, json.loads(sample["json"]))
        assert seen == expected
        assert list(seen) == [key for shard in manifest.split(split) for key in ShardReader(shard.path).keys]


def test_plain_tarfile_sees_image_then_record_and_fixed_headers(ten):
    ten.make()
    with tarfile.open(ten.out / "test-000000.tar") as tar:
        assert tar.getnames() == ["test.png", "test.json"]
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            assert member.mode == 0o644


def test_manifest_states_what_is_on_disk(ten):
    ten.make(command=["make_shards.py", "--seed", "0"])
    content = json.loads((ten.out / "manifest.json").read_text())
    assert content["format"] == "open-clip-amp shards"
    assert content["version"] == 1
    assert {split: (entry["samples"], entry["captions"]) for split, entry in content["splits"].items()} == {
        "train": (10, 20),
        "test": (1, 2),
    }
    shards = [shard for entry in content["splits"].values() for shard in entry["shards"]]
    assert [(shard["name"], shard["samples"]) for shard in shards] == [
        ("train-000000.tar", 4),
        ("train-000001.tar", 4),
        ("train-000002.tar", 2),
        ("test-000000.tar", 1),
    ]
    for shard in shards:
        file = (ten.out / shard["name"]).read_bytes()
        assert (shard["bytes"], shard["sha256"]) == (len(file), hashlib.sha256(file).hexdigest())
    provenance = content["provenance"]
    assert provenance["captions"] == {
        "file": "captions.jsonl",
        "sha256": hashlib.sha256((ten.root / "captions.jsonl").read_bytes()).hexdigest(),
    }
    assert provenance["knowledge"] is None
    assert provenance["resize"] is None
    assert provenance["command"] == ["make_shards.py", "--seed", "0"]
    assert all(entries == [] for entries in content["skipped"].values())
    loaded = ShardManifest.load(ten.out)
    assert loaded.to_dict() == content
    loaded.verify()


def test_knowledge_provenance_is_copied(ten, tmp_path):
    ten.know("0.jpg", "A man runs", "Legs apart")
    source = tmp_path / "provenance.json"
    source.write_text('{"model": "some LLM", "seed": 3}')
    manifest = ten.make(knowledge_provenance=str(source))
    assert manifest.provenance["knowledge"]["provenance"] == {"model": "some LLM", "seed": 3}
    assert manifest.provenance["knowledge"]["captions_with_knowledge"] == 1
    assert manifest.captions_without_knowledge == {"train": 19, "test": 2}


def test_equal_input_gives_equal_bytes_whatever_the_workers(ten):
    ten.make()
    alone = ten.tars()
    ten.out = ten.root / "again"
    ten.make(workers=2)
    assert {name: sha for name, (_, sha) in ten.tars().items()} == {name: sha for name, (_, sha) in alone.items()}


def test_the_order_is_shuffled_by_the_seed_within_each_split(data):
    for n in range(40):
        data.add(f"{n:02d}.jpg", captions=("A",), size=(4, 4))
    orders = {}
    for seed in (0, 1):
        data.out = data.root / f"out{seed}"
        orders[seed] = list(everything(data.make(seed=seed, samples_per_shard=7), "train"))
    assert sorted(orders[0]) == sorted(orders[1]) == [f"{n:02d}" for n in range(40)]
    assert orders[0] != orders[1]
    # A shard should be a random sample: neighbours in the file should not be neighbours in the shard.
    steps = [abs(int(a) - int(b)) for a, b in zip(orders[0], orders[0][1:], strict=False)]
    assert 8 < np.mean(steps) < 20  # the mean of a random order is 40 / 3


def test_files_with_the_same_stem_get_keys_of_their_own(data):
    for name in ("cats/1.jpg", "dogs/1.jpg", "1.png", "2.jpg", "2 .jpg", "a.b.jpg", "a_b.jpg", "\u72d7.jpg"):
        data.add(name)
    samples = everything(data.make(), "train")
    assert len(samples) == 8
    assert {record["filename"] for _, record in samples.values()} == {row["image"] for row in data.rows}
    assert all("." not in key and "/" not in key and key.isascii() for key in samples)
    assert "2" in samples


def test_options_choose_images(ten):
    names = ten.root / "exclude.txt"
    names.write_text("3.jpg\n4.jpg\ntest.png\nno-such.jpg\n")
    manifest = ten.make(exclude_images=str(names), limit=5)
    assert (manifest.samples("train"), manifest.samples("test")) == (5, 1)
    assert manifest.excluded == {"train": 2}
    assert manifest.provenance["exclude_images"]["names"] == 4
    chosen = set(everything(manifest, "train"))
    assert chosen <= {"0", "1", "2", "5", "6", "7", "8", "9"}

    ten.out = ten.root / "more"  # a larger limit takes the same images and some more
    assert chosen < set(everything(ten.make(exclude_images=str(names), limit=7), "train"))

    ten.out = ten.root / "test only"
    assert list(ten.make(splits=["test"]).splits) == ["test"]


def test_excluding_from_another_split(ten):
    ten.add("second.jpg", "test")
    names = ten.root / "exclude.txt"
    names.write_text("test.png\n3.jpg\n")
    manifest = ten.make(exclude_images=str(names), exclude_split="test")
    assert (manifest.samples("train"), manifest.samples("test")) == (10, 1)


# Images


def test_image_bytes_pass_through_untouched_when_small_enough(tmp_path):
    photo(tmp_path / "a.JPEG", size=(40, 30))
    original = (tmp_path / "a.JPEG").read_bytes()
    for resize in (None, Resize(30), Resize(31), Resize(500)):
        assert read_image(tmp_path / "a.JPEG", resize) == (original, "jpeg")


@pytest.mark.parametrize(
    ("resize", "size"),
    [
        (Resize(15), (20, 15)),
        (Resize(15, "squash"), (15, 15)),
        (Resize(40, "squash"), (40, 40)),
        (Resize(1), (1, 1)),
    ],
)
def test_resize(tmp_path, resize, size):
    photo(tmp_path / "a.png", size=(40, 30))
    content, extension = read_image(tmp_path / "a.png", resize)
    assert extension == "jpg"
    with Image.open(io.BytesIO(content)) as image:
        assert (image.format, image.size, image.mode) == ("JPEG", size, "RGB")


def test_resized_pixels_are_those_of_a_bicubic_reduction(tmp_path):
    x, y = np.meshgrid(np.arange(64), np.arange(48))
    smooth = np.stack([4 * x, 5 * y, 2 * (x + y)], axis=-1).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "a.png")
    content, _ = read_image(tmp_path / "a.png", Resize(24, quality=95))
    expected = Image.fromarray(smooth).resize((32, 24), Image.Resampling.BICUBIC)
    difference = np.asarray(Image.open(io.BytesIO(content))).astype(int) - np.asarray(expected).astype(int)
    assert np.abs(difference).mean() < 1.5


def test_resized_shards_say_so(ten):
    manifest = ten.make(resize=12, resize_mode="squash", resize_quality=80)
    assert manifest.provenance["resize"] == {"size": 12, "mode": "squash", "quality": 80}
    for content, _ in [*everything(manifest, "train").values(), *everything(manifest, "test").values()]:
        assert Image.open(io.BytesIO(content)).size == (12, 12)
    with tarfile.open(ten.out / "test-000000.tar") as tar:
        assert tar.getnames() == ["test.jpg", "test.json"]


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_of_pixels_is_accepted(tmp_path, mode):
    extension = "jpg" if mode == "CMYK" else "png"
    Image.new(mode, (9, 7)).save(tmp_path / f"a.{extension}")
    assert read_image(tmp_path / f"a.{extension}")[1] == extension


def spoil(path, how):
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("<html>404</html>")
    elif how == "flipped":  # inside the pixels of a PNG, which its checksum detects
        path.write_bytes(content[:60] + bytes(255 - b for b in content[60:64]) + content[64:])
    elif how == "checksum":  # of a PNG's last pixel chunk, which decoding doesn't detect
        path.write_bytes(content[:-16] + bytes([content[-16] ^ 1]) + content[-15:])
    elif how == "postscript":
        path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")


@pytest.mark.parametrize(
    ("how", "extension", "words"),
    [
        ("cut", "jpg", "truncated"),
        ("cut", "png", "damaged"),
        ("cut", "webp", "damaged|not an image"),
        ("flipped", "png", "damaged"),
        ("checksum", "png", "checksum"),
        ("empty", "jpg", "0 bytes, not an image"),
        ("text", "jpg", "16 bytes, not an image in one of the formats JPEG"),
        ("postscript", "jpg", "not an image"),
    ],
)
def test_damaged_images_are_found(tmp_path, how, extension, words):
    path = tmp_path / f"a.{extension}"
    photo(path, size=(64, 64))
    whole = path.read_bytes()
    for check in ("structure", "decode"):
        path.write_bytes(whole)
        read_image(path, check=check)
        spoil(path, how)
        with pytest.raises(UnreadableImageError, match=words) as error:
            read_image(path, check=check)
        assert not error.value.may_pass
        assert "object at 0x" not in str(error.value)


def test_shards_checked_by_structure_alone_are_checked_again_where_decoding_is_asked_for(ten, monkeypatch):
    """The reverse is not necessary. The bytes of the shards are the same."""
    ten.make(check="structure")
    before, (real, seen) = ten.tars(), (write.read_image, [])

    def noted(path, resize, check):
        seen.append(check)
        return real(path, resize, check)

    monkeypatch.setattr(write, "read_image", noted)
    manifest = ten.make(check="decode")
    assert seen == ["decode"] * len(seen) and len(seen) == 11
    assert manifest.provenance["check"] == "decode"
    assert {name: content for name, (_, content) in ten.tars().items()} == {n: c for n, (_, c) in before.items()}
    ten.make(check="structure")
    assert len(seen) == 11


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    photo(tmp_path / "a.png", size=(64, 64))
    # Pillow warns above its limit and raises above twice the limit; both are errors here.
    for limit in (3000, 2000):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        # Pillow's own message names twice the limit, but photos of that size are refused too.
        with pytest.raises(UnreadableImageError, match=f"expected at most {limit:,}: a decompression bomb, or a photo"):
            read_image(tmp_path / "a.png")


@pytest.mark.parametrize("bad", [{"size": 0}, {"size": 9000}, {"size": 9, "mode": "crop"}, {"size": 9, "quality": 0}])
def test_resize_options_are_checked(bad):
    with pytest.raises(AmpError, match="expected"):
        Resize(**bad)


# Skipped images


def test_what_is_left_out_is_listed(ten):
    spoil(ten.images / "1.jpg", "cut")
    (ten.images / "2.jpg").unlink()
    (ten.images / "3.jpg").unlink()
    (ten.images / "3.jpg").mkdir()
    ten.rows += [
        {"image": "notes.txt", "caption": "Not a photo", "split": "train"},
        {"image": "0.jpg", "caption": "", "split": "train"},
        {"image": "", "caption": "Of nothing", "split": "test"},
        {"image": "bare.jpg", "caption": " ", "split": "test"},
    ]
    manifest = ten.make(max_skipped=0.6)
    assert (manifest.samples("train"), manifest.captions("train"), manifest.samples("test")) == (7, 14, 1)
    listed = {kind: [entry["file"] for entry in entries] for kind, entries in manifest.skipped.items()}
    assert {kind: sorted(files) for kind, files in listed.items()} == {
        "unreadable_image": ["1.jpg", "notes.txt"],
        "missing_image": ["2.jpg", "3.jpg"],
        "image_without_caption": ["bare.jpg"],
        "duplicate_key": [],
        "caption_without_image": [""],
        "empty_caption": ["0.jpg", "bare.jpg"],
    }
    reasons = {entry["file"]: entry for entries in manifest.skipped.values() for entry in entries}
    assert "truncated" in reasons["1.jpg"]["reason"].lower()
    assert reasons["1.jpg"]["captions"] == 2
    assert "No such file" in reasons["2.jpg"]["reason"]
    assert reasons["3.jpg"]["reason"] == "not a file"
    assert ".txt" in reasons["notes.txt"]["reason"]
    assert ShardManifest.load(ten.out).skipped == manifest.skipped


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (
            lambda d: spoil(d.images / "1.jpg", "cut"),
            r"1 of 11 images .9.09%. and 2 of 22 .*1 unreadable_image",
        ),
        (lambda d: (d.images / "2.jpg").unlink(), "1 missing_image; first: 2.jpg: No such file"),
        (
            lambda d: d.rows.append({"image": "0.jpg", "caption": "", "split": "train"}),
            "1 of 23 captions .*empty_caption",
        ),
    ],
    ids=["unreadable", "missing", "empty"],
)
def test_too_much_left_out_is_an_error_and_no_manifest(ten, trouble, words):
    trouble(ten)
    with pytest.raises(AmpError, match=words) as error:
        ten.make()
    assert "--max_skipped 0.01" in str(error.value)
    assert not (ten.out / "manifest.json").exists()
    # The solution in the message works and reuses the shards of the first run.
    allowed = float(str(error.value).rsplit("--max_skipped ", 1)[1])
    before = ten.tars()
    ten.make(max_skipped=allowed)
    assert before.items() <= ten.tars().items()


def test_an_earlier_manifest_does_not_survive_a_failed_run(ten):
    ten.make()
    spoil(ten.images / "1.jpg", "cut")
    with pytest.raises(AmpError, match="unreadable_image"):
        ten.make()
    with pytest.raises(AmpError, match="no such file; expected the manifest"):
        ShardManifest.load(ten.out)


def test_a_split_without_readable_images_is_an_error(ten):
    spoil(ten.images / "test.png", "empty")
    with pytest.raises(AmpError, match="no image of split 'test' can be read"):
        ten.make(max_skipped=1.0)
    assert not (ten.out / "test-000000.tar").exists()


def test_a_split_that_loses_all_its_images_is_no_silence(ten):
    """Its captions may be empty (then no image belongs to the split), or its files may be missing."""
    ten.rows.append({"image": "bare.jpg", "caption": "", "split": "val"})
    with pytest.raises(AmpError, match=r"1 empty_caption, 1 image_without_caption; first: bare.jpg: .* is empty"):
        ten.make()
    assert [skip["split"] for skip in ten.make(max_skipped=0.5).skipped["image_without_caption"]] == ["val"]
    assert not ten.make(splits=["train", "test"]).skipped["image_without_caption"]
    (ten.images / "test.png").unlink()
    words = "left in split 'test' .excluded: 0.; 1 can't be used, first: test.png: No such file.*check --images"
    with pytest.raises(AmpError, match=words):
        ten.make(max_skipped=0.5)


def test_an_image_that_could_not_be_opened_is_tried_again(ten, monkeypatch):
    real = read_limited

    def failing(path):
        if path.name == "1.jpg":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr("amp.data.images.file.read_limited", failing)
    manifest = ten.make(max_skipped=0.5)
    assert manifest.skipped["unreadable_image"][0]["reason"] == "can't be read (Permission denied)"
    before = ten.tars()
    monkeypatch.undo()
    assert ten.make().samples("train") == 10
    assert sum(before[name] != tar for name, tar in ten.tars().items()) == 1


# Resuming


def test_a_second_run_writes_nothing(ten):
    first = ten.make().to_dict()
    before = ten.tars()
    assert ten.make().to_dict() == first
    assert ten.tars() == before


def change_caption(data):
    data.rows[0]["caption"] = "A woman runs"


def change_knowledge(data):
    data.know("0.jpg", "A man runs", "Legs apart")


def change_image(data):
    photo(data.images / "0.jpg", seed=99)


def touch_nothing(data):
    (data.out / "train-000001.tar").unlink()


def cut_tar(data):
    path = data.out / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:-512])


def lose_sidecar(data):
    (data.out / ".plan" / "train-000001.tar.json").unlink()


def spoil_sidecar(data):
    (data.out / ".plan" / "train-000001.tar.json").write_text("{")


@pytest.mark.parametrize(
    "change", [change_caption, change_knowledge, change_image, touch_nothing, cut_tar, lose_sidecar, spoil_sidecar]
)
def test_only_what_is_missing_or_changed_is_written_again(ten, change, capsys):
    ten.make()
    before = ten.tars()
    change(ten)
    capsys.readouterr()
    manifest = ten.make()
    manifest.verify()
    said = f"{ten.out}: existing shards to be replaced, because they differ from what these options give: 1\n"
    assert (said in capsys.readouterr().err) == (change is not touch_nothing)
    after = ten.tars()
    assert set(after) == set(before)
    assert sum(after[name] != before[name] for name in after) == 1
    ten.out = ten.root / "fresh"
    ten.make()
    assert {name: sha for name, (_, sha) in ten.tars().items()} == {name: sha for name, (_, sha) in after.items()}


@pytest.mark.parametrize("error", [KeyboardInterrupt, AmpError])
def test_an_interrupted_run_leaves_nothing_that_counts_and_is_resumed(ten, monkeypatch, error):
    real, calls = write.read_image, []

    def stops(path, resize, check):
        calls.append(path)
        if len(calls) == 6:
            raise error("stopped")
        return real(path, resize, check)

    monkeypatch.setattr(write, "read_image", stops)
    with pytest.raises(error):
        ten.make()
    assert sorted(path.name for path in ten.out.iterdir()) == [".plan", "train-000000.index.npy", "train-000000.tar"]
    before = ten.tars()
    monkeypatch.undo()
    ten.make().verify()
    assert before.items() <= ten.tars().items()


def test_a_killed_run_is_resumed(ten, monkeypatch):
    """After kill -9 a temporary file is left. It is never used, and the next run removes it."""
    code = (
        "import os, sys\n"
        "from amp.data.conversion import write\n"
        "from amp.data.conversion.make import make_shards\n"
        "real, calls = write.read_image, []\n"
        "def dies(path, resize, check):\n"
        "    calls.append(path)\n"
        "    if len(calls) == 6: os.kill(os.getpid(), 9)\n"
        "    return real(path, resize, check)\n"
        "write.read_image = dies\n"
        "make_shards(*sys.argv[1:], workers=1, samples_per_shard=4)\n"
    )
    ten.rows, rows = ten.rows[:2], ten.rows
    ten.make()  # writes the captions file
    ten.rows = rows
    captions = ten.root / "captions.jsonl"
    captions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ten.out = ten.root / "killed"
    arguments = [str(path) for path in (captions, ten.images, ten.out)]
    assert subprocess.run([sys.executable, "-c", code, *arguments], check=False).returncode == -9
    assert [path.name for path in ten.out.glob("*.tar")] == ["train-000000.tar"]
    assert len(list(ten.out.glob("*.tmp"))) == 1
    assert not (ten.out / "manifest.json").exists()
    before = ten.tars()
    ten.make().verify()
    assert before.items() <= ten.tars().items()
    assert not list(ten.out.glob("*.tmp"))


def _die(*arguments):
    os._exit(1)


@pytest.mark.system
def test_a_dead_worker_is_an_error_and_not_a_hang(ten, monkeypatch):
    monkeypatch.setattr(write, "_write_in_worker", _die)
    with pytest.raises(AmpError, match="a worker process was killed"):
        ten.make(workers=2)


def test_a_full_disk_is_one_clear_error(ten, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "add_member", full)
    with pytest.raises(AmpError, match=r"train-000000.tar: can't be written .No space left on device.; make room"):
        ten.make()
    assert list(ten.out.glob("*.tar")) == list(ten.out.glob("*.tmp")) == []


def test_larger_shards_replace_smaller_ones(ten):
    ten.make(samples_per_shard=2)
    assert len(ten.tars()) == 6
    ten.make(samples_per_shard=100).verify()
    assert list(ten.tars()) == ["test-000000.tar", "train-000000.tar"]
    assert sorted(path.name for path in (ten.out / ".plan").glob("*.json")) == [
        "test-000000.tar.json",
        "train-000000.tar.json",
    ]


def test_shards_of_another_split_are_not_deleted(ten):
    ten.make()
    before = ten.tars()
    with pytest.raises(AmpError, match=r"contains shards of split 'train' .*expected only test"):
        ten.make(splits=["test"])
    assert ten.tars() == before
    ShardManifest.load(ten.out).verify()


def test_foreign_tars_are_not_overwritten(ten):
    ten.out.mkdir()
    (ten.out / "train-000000.tar").write_bytes(b"mine")
    with pytest.raises(AmpError, match="contains tar files that this tool didn't make"):
        ten.make()
    assert (ten.out / "train-000000.tar").read_bytes() == b"mine"


def test_two_runs_into_one_folder_are_refused(ten):
    ten.make()
    with lock_folder(ten.out), pytest.raises(AmpError, match="another run is writing shards here"):
        ten.make()
    ten.make()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"splits": ["val"]}, "--splits names 'val', but no image is in it; expected splits out of train, test"),
        ({"limit": 0}, "limit is 0; expected 1 or more"),
        ({"samples_per_shard": 0}, "samples_per_shard is 0"),
        ({"workers": 0}, "workers is 0"),
        ({"max_skipped": 1.5}, "max_skipped is 1.5; expected a fraction"),
        ({"resize": 0}, "resize is 0"),
        ({"format": "karpathy"}, "line 2: not valid JSON"),
        ({"knowledge": "no.jsonl"}, "no.jsonl: can't be read"),
        ({"knowledge_provenance": "p.json"}, "given without knowledge"),
        ({"exclude_images": "no.txt"}, "no.txt: can't be read"),
    ],
)
def test_wrong_options(ten, options, words):
    with pytest.raises(AmpError, match=words):
        ten.make(**options)
    assert not ten.out.exists()


def test_wrong_folders_and_lists(ten):
    names = ten.root / "exclude.txt"
    names.write_text("other.jpg\n")
    with pytest.raises(AmpError, match=r"none of its 1 names is an image of split 'train'"):
        ten.make(exclude_images=str(names))
    names.write_text("test.png\n")
    with pytest.raises(AmpError, match=r"no image is left in split 'test' .excluded: 1."):
        ten.make(exclude_images=str(names), exclude_split="test")
    ten.out.write_text("a file")
    with pytest.raises(AmpError, match="can't be created or written"):
        ten.make()
    ten.images = ten.root / "nowhere"
    with pytest.raises(AmpError, match="nowhere: no such folder; expected the folder of image files"):
        ten.make()


# The command line


command_line = partial(run_here, "tools/make_shards.py")


def test_command_line(ten):
    ten.make()  # writes the captions file
    options = ["--captions", ten.root / "captions.jsonl", "--images", ten.images, "--out", ten.root / "cli"]
    done = command_line(*options, "--samples_per_shard", 4, "--splits", "train", "test", "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert re.search(r"writing 4 shards: (10 of 10|11 of 11) images, (.* )?took ", done.stderr)
    assert "manifest.json written" in done.stdout.replace("\n", "")
    expected = {name: sha for name, (_, sha) in ten.tars().items()}
    ten.out = ten.root / "cli"
    assert {name: sha for name, (_, sha) in ten.tars().items()} == expected
    assert ShardManifest.load(ten.out).provenance["command"][:2] == ["make_shards.py", "--captions"]


def test_a_pipe_is_refused_since_its_hash_would_be_that_of_nothing(ten):
    os.mkfifo(ten.root / "pipe.jsonl")
    with pytest.raises(AmpError, match=r"pipe.jsonl: can't be read \(a pipe, which can be read only once\)"):
        make_shards(str(ten.root / "pipe.jsonl"), str(ten.images), str(ten.out))


def test_an_empty_out_is_not_the_current_folder(ten, monkeypatch):
    ten.make()
    monkeypatch.chdir(ten.root)
    before = sorted(ten.root.iterdir())
    done = command_line("--captions", "captions.jsonl", "--images", "images", "--out", "")
    assert done.returncode == 2 and "out is empty, expected a path; add --out PATH" in done.stderr.splitlines()[-1]
    assert sorted(ten.root.iterdir()) == before


def test_command_line_errors_are_one_line(tmp_path):
    options = ["--captions", tmp_path / "no.json", "--images", tmp_path, "--out", tmp_path / "out"]
    done = command_line(*options)
    assert (done.returncode, done.stdout) == (2, "")
    assert [done.stderr.rstrip().partition(": ")[2]] == [
        f"error: {tmp_path / 'no.json'}: can't be read (No such file or directory); expected a file; check the path"
    ]
    done = command_line(*options, "--sample_per_shard", 3)
    assert done.returncode == 2
    assert "sample_per_shard" in done.stderr.splitlines()[-1]


# The reader


def record(name, **changes):
    content = {"schema": 1, "key": name, "captions": [{"id": 0, "text": "x"}], **changes}
    return f"{name}.json", json.dumps(content).encode()


def special(name, kind):
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = "/etc/passwd"
    return info


GOOD = [("a.jpg", b"A"), record("a"), record("b"), ("b.PNG".lower(), b"BB")]


def test_reader_of_a_foreign_tar(tmp_path):
    """Any order within a sample, long names, and pax headers are valid WebDataset."""
    key = "k" * 150
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{format}.tar"
        with tarfile.open(path, "w", format=format) as tar:
            for name, content in [*GOOD, (f"{key}.webp", b"C"), record(key)]:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        reader = ShardReader(path)
        assert reader.keys == ["a", "b", key]
        assert [reader.read(i)[0] for i in range(3)] == [b"A", b"BB", b"C"]
        assert reader.read(2)[1]["key"] == key
        with pytest.raises(IndexError):
            reader.read(3)
        reader.close()
        reader.close()
        with pytest.raises(ValueError, match="after close"):
            reader.read(0)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([], "holds no sample"),
        ([("/a.jpg", b"A")], "absolute or parent path"),
        ([("../a.jpg", b"A")], "absolute or parent path"),
        ([("x/../../a.jpg", b"A")], "absolute or parent path"),
        ([special("a.jpg", tarfile.SYMTYPE)], "link, a folder or a device"),
        ([special("a.jpg", tarfile.LNKTYPE)], "link, a folder or a device"),
        ([special("a.jpg", tarfile.CHRTYPE)], "link, a folder or a device"),
        ([special("a.jpg", tarfile.FIFOTYPE)], "link, a folder or a device"),
        ([special("a", tarfile.DIRTYPE)], "link, a folder or a device"),
        ([*GOOD, ("c.pyd", b"P")], "'c.pyd' isn't part of a sample; .*pickles are never read"),
        ([*GOOD, ("c.pkl", b"P")], "isn't part of a sample"),
        ([*GOOD, ("b.cls", b"1")], "isn't part of a sample"),
        ([("a.seg.jpg", b"A"), record("a")], "isn't part of a sample"),
        ([(".jpg", b"A"), (".json", b"{}")], "isn't part of a sample"),
        ([*GOOD, ("a.jpg", b"A"), record("a")], "key 'a' occurs twice"),
        ([("a.jpg", b"A"), ("a.png", b"A"), record("a")], "key 'a' occurs twice"),
        ([("a.jpg", b"A"), record("b"), record("a")], "key 'a' occurs twice"),
        ([*GOOD, ("c.jpg", b"A")], "sample 'c' lacks a .json record"),
        ([record("c")], "sample 'c' lacks an image"),
    ],
)
def test_reader_refuses(tmp_path, members, words):
    path = tar_of(tmp_path / "x.tar", *members)
    with pytest.raises(AmpError, match=words) as error:
        ShardReader(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (("a.json", b"{"), "a.json: not JSON"),
        (("a.json", b"\xff\xfe"), "a.json: not JSON"),
        (("a.json", b"[]"), "expected an object"),
        (("a.json", b"{}"), "key 'schema' is missing"),
        (record("a", schema=2), "'schema' is 2; this release reads schema 1"),
        (record("a", key="b"), "'key' is 'b'; expected 'a'"),
        (record("a", captions=[]), "'captions' is empty"),
        (record("a", captions="x"), "'captions' is 'x'; expected a list"),
    ],
)
def test_reader_refuses_records(tmp_path, bad, words):
    reader = ShardReader(tar_of(tmp_path / "x.tar", ("a.jpg", b"A"), bad))
    with pytest.raises(AmpError, match=words) as error:
        reader.read(0)
    assert "x.tar" in str(error.value)


def test_reader_notices_every_cut(tmp_path):
    """A tar truncated anywhere is refused. tarfile accepts one that is truncated between two members."""
    path = tar_of(tmp_path / "x.tar", *GOOD)
    content = path.read_bytes()
    end = len(content.rstrip(b"\0"))
    end += -end % 512 + 1024
    for size in range(0, end, 256):
        path.write_bytes(content[:size])
        with pytest.raises(AmpError):
            ShardReader(path)
    path.write_bytes(content[:end])
    assert len(ShardReader(path)) == 2


def test_reader_notices_a_damaged_header(tmp_path):
    path = tar_of(tmp_path / "x.tar", *GOOD)
    content = bytearray(path.read_bytes())
    content[2048 + 3] ^= 0xFF  # the name in the third header
    path.write_bytes(content)
    with pytest.raises(AmpError, match="damaged or truncated after 2 members"):
        ShardReader(path)


def test_reader_refuses_other_files(tmp_path):
    with pytest.raises(AmpError, match=r"no.tar: can't be read .No such file"):
        ShardReader(tmp_path / "no.tar")
    with pytest.raises(AmpError, match=r"not a readable tar"):
        ShardReader(tar_of(tmp_path / "x.tar.gz", *GOOD, mode="w:gz"))
    (tmp_path / "x.tar").write_bytes(b"x" * 5000)
    with pytest.raises(AmpError, match=r"not a readable tar"):
        ShardReader(tmp_path / "x.tar")
    with pytest.raises(AmpError, match=r"can't be read .Is a directory|not a readable"):
        ShardReader(tmp_path)


@pytest.fixture
def many(tmp_path):
    members = [m for n in range(200) for m in ((f"{n}.jpg", bytes([n]) * (1 + 37 * n)), record(str(n)))]
    return ShardReader(tar_of(tmp_path / "many.tar", *members))


def read_is_right(reader, n):
    content, found = reader.read(n)
    return content == bytes([n]) * (1 + 37 * n) and found["key"] == str(n)


def test_reader_serves_threads(many):
    order = np.random.default_rng(0).integers(0, 200, 4000).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda n: read_is_right(many, n), order))


def _read_all(reader, queue):
    queue.put(all(read_is_right(reader, n) for _ in range(5) for n in range(200)))


def test_reader_survives_a_fork_and_pickling(many):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_read_all, args=(many, queue)) for _ in range(2)]
    for child in children:
        child.start()
    assert all(read_is_right(many, n) for _ in range(5) for n in range(200))
    assert [queue.get(timeout=60) for _ in children] == [True, True]
    for child in children:
        child.join()
    copy = pickle.loads(pickle.dumps(many))
    many.close()
    assert copy.keys == many.keys
    assert read_is_right(copy, 199)


# The manifest


def test_manifest_of_a_folder_without_one(tmp_path):
    with pytest.raises(AmpError, match="nowhere: no such folder"):
        ShardManifest.load(tmp_path / "nowhere")
    with pytest.raises(AmpError, match=r"manifest.json: no such file; .*amp make_shards"):
        ShardManifest.load(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(AmpError, match="can't be read as JSON"):
        ShardManifest.load(tmp_path)


def changed(content, *path, value=None):
    *parents, last = path
    inner = content
    for key in parents:
        inner = inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("format",), "other", "'format' is 'other'; expected 'open-clip-amp shards'"),
        (("format",), None, "key 'format' is missing"),
        (("version",), 2, "'version' is 2; this release reads version 1"),
        (("splits",), [], "'splits' is ..; expected an object"),
        (("splits", "train", "shards"), None, "splits.train: key 'shards' is missing"),
        (("splits", "train", "samples"), 11, "splits.train: 'samples' is 11; expected 10"),
        (("splits", "train", "captions"), True, "'captions' is True; expected a whole number"),
        (("splits", "train", "shards", 0, "name"), "../x.tar", "'name' is '../x.tar'; expected a file name"),
        (("splits", "train", "shards", 1, "sha256"), None, r"splits.train.shards\[1\]: key 'sha256' is missing"),
        (("splits", "train", "shards", 1, "bytes"), "9", r"shards\[1\]: 'bytes' is '9'; expected a whole number"),
    ],
)
def test_manifest_malformed(ten, path, value, words):
    content = ten.make().to_dict()
    changed(content, *path, value=value)
    (ten.out / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(AmpError, match=words) as error:
        ShardManifest.load(ten.out)
    assert str(ten.out / "manifest.json") in str(error.value)


def test_split_of_a_manifest(ten):
    manifest = ten.make()
    shards = ShardManifest.load(ten.out / "manifest.json").split("train")
    assert shards == manifest.splits["train"]
    assert isinstance(shards[0], ShardInfo)
    assert shards[0].name == "train-000000.tar"
    with pytest.raises(AmpError, match="split 'val' doesn't exist; splits present: train, test"):
        manifest.split("val")
    with pytest.raises(AmpError, match="split 'none' holds no sample"):
        ShardManifest(ten.out, {"none": []}).split("none")
    size = shards[1].path.stat().st_size
    os.truncate(shards[1].path, size - 512)
    with pytest.raises(AmpError, match=rf"train-000001.tar: {size - 512} bytes; expected {size}"):
        manifest.split("train")
    shards[1].path.unlink()
    with pytest.raises(AmpError, match=r"train-000001.tar: No such file"):
        manifest.split("train")


def test_verify_finds_a_changed_byte(ten):
    manifest = ten.make()
    path = manifest.splits["test"][0].path
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)
    manifest.split("test")
    with pytest.raises(AmpError, match=r"test-000000.tar: sha256 is"):
        manifest.verify()


# Real photos


@pytest.mark.skipif(not FLICKR8K.is_dir(), reason="needs Flickr8k in ../shared/data/flickr8k")
def test_flickr8k_sample(tmp_path):
    manifest = make_shards(
        str(FLICKR8K / "dataset_flickr8k.json"),
        str(FLICKR8K / "images"),
        str(tmp_path),
        knowledge=str(FLICKR8K / "knowledge.jsonl"),
        limit=20,
        samples_per_shard=8,
        workers=1,
    )
    entries = {e["filename"]: e for e in json.loads((FLICKR8K / "dataset_flickr8k.json").read_text())["images"]}
    known = {k["sentid"]: k for k in map(json.loads, (FLICKR8K / "knowledge.jsonl").open(encoding="utf-8"))}
    for split in ("train", "val", "test"):
        samples = everything(manifest, split)
        assert len(samples) == 20
        for image, found in samples.values():
            entry = entries[found["filename"]]
            assert image == (FLICKR8K / "images" / found["filename"]).read_bytes()
            assert (found["split"], found["image_id"]) == (split, entry["imgid"]) == (entry["split"], entry["imgid"])
            for caption, sentence in zip(found["captions"], entry["sentences"], strict=True):
                assert (caption["id"], caption["text"]) == (sentence["sentid"], sentence["raw"].strip())
                assert caption["triplets"] == known[sentence["sentid"]]["triplets"]
                assert caption["states"] == known[sentence["sentid"]]["states"]


# Messages to the user


def told(data, **options):
    """Output of a conversion."""
    shown = io.StringIO()
    manifest = data.make(console=PlainConsole(file=shown, width=80), **options)
    return manifest, shown.getvalue()


def test_splits_that_training_would_miss_are_told_at_conversion(data):
    for n, split in enumerate(("Validation", "fold1", "TEST")):
        data.add(f"{n}.jpg", split)
    manifest, shown = told(data)
    assert list(manifest.splits) == ["val", "fold1", "test"]
    assert "splits stored: 'Validation' as 'val', 'TEST' as 'test'\n" in shown
    assert "no split 'train' in it; splits seen: val, fold1, test; these are enough for an evaluation; to" in shown
    data.out = data.root / "some"
    assert list(told(data, splits=["Testing", "dev"])[0].splits) == ["val", "test"]
    data.add("3.jpg", "training")
    data.out = data.root / "more"
    manifest, shown = told(data)
    assert "no split 'train'" not in shown and "train" in manifest.splits


def test_texts_longer_than_clip_reads_are_counted(data):
    data.add("0.jpg", captions=("A dog", "A dog " + "and a cat " * 40))
    data.add("1.jpg", captions=("A cat",))
    assert "longer than" in (shown := told(data)[1])
    assert "at least 1 of 3 captions are longer than the 77 tokens that CLIP reads" in shown
    triplet = {"subject": "dog", "action": "runs", "object": ""}
    long, short = "It is in the air and " * 20, "It is in the air"
    data.knowledge = [
        {"image": "0.jpg", "caption": "A dog", "triplets": [triplet] * 2, "states": [long, short]},
        {"image": "1.jpg", "caption": "A cat", "triplets": [triplet], "states": [long]},
    ]
    assert "at least 1 of 3 captions and 2 of 3 states are longer than" in told(data)[1]
    data.rows[1]["caption"] = "A dog again"
    assert "at least 2 of 3 states are longer than" in told(data)[1]
    data.knowledge = data.knowledge[1:]
    data.knowledge[0]["states"] = [short]
    assert "longer than" not in told(data)[1]


def test_absolute_paths_give_the_shards_of_relative_paths(data):
    """Also if knowledge and the list of excluded images were made from the file with absolute paths."""
    for n in range(3):
        data.add(f"s/{n}.jpg")
        data.know(f"s/{n}.jpg", "A man runs", "Legs apart")
    excluded = data.root / "excluded.txt"
    excluded.write_text("s/2.jpg\n")
    data.make(exclude_images=str(excluded))
    expected = [digest for _, digest in data.tars().values()]
    for row in (*data.rows, *data.knowledge):
        row["image"] = f"{data.images}/{row['image']}"
    excluded.write_text(f"{data.images}/s/2.jpg\n")
    data.out = data.root / "absolute"
    manifest = data.make(exclude_images=str(excluded))
    assert [digest for _, digest in data.tars().values()] == expected
    assert sorted(record["filename"] for _, record in everything(manifest, "train").values()) == ["s/0.jpg", "s/1.jpg"]
    data.rows.append({**data.rows[0], "image": "/elsewhere/0.jpg"})
    with pytest.raises(AmpError, match=f"captions.jsonl: image file '/elsewhere/0.jpg' .* folder {data.images}; "):
        data.make()
    data.rows.pop()
    pytest.importorskip("spacy", reason='needs spaCy: pip install "open-clip-amp[generate]"')
    data.knowledge, data.out = [], data.root / "without"
    data.make()  # writes the captions file
    generated = run_here(
        "tools/generate_knowledge.py", "--captions", data.root / "captions.jsonl", "--out", data.root / "knowledge"
    )
    assert generated.returncode == 0, generated.stderr
    data.knowledge, data.out = [], data.root / "generated"
    manifest = data.make(knowledge=str(data.root / "knowledge"))
    assert manifest.captions_without_knowledge == {"train": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda spans: spans[:-1], r"shape \(1, 2, 2\); expected int64 \(2, 2, 2\)"),
        (lambda spans: spans.astype("<i4"), "an array int32 of shape"),
        (lambda spans: spans * [1, 10**6], "sample 0 is at .* expected offsets and sizes inside of the files"),
        (lambda spans: spans - [10**6, 0], "sample 0 is at .* expected offsets and sizes inside of the files"),
        (lambda spans: spans - [-1 << 40, 0], "sample 0 is at .* expected offsets and sizes inside of the files"),
    ],
)
def test_an_index_that_does_not_fit_its_shard_is_refused(tmp_path, change, message):
    """Also if the manifest has the hash of the wrong index."""
    records = {key: json.dumps({"schema": 1, "key": key, "captions": [{"text": "x"}]}).encode() for key in "ab"}
    members = [(f"{key}.{kind}", record) for key, record in records.items() for kind in ("jpg", "json")]
    path = tar_of(tmp_path / "x.tar", *members)
    with ShardReader(path) as reader:
        spans = reader.spans
    for wanted, problem in ((spans, None), (change(spans), message)):
        file = io.BytesIO()
        np.save(file, wanted)
        index_of(path).write_bytes(file.getvalue())
        if problem is None:
            with ShardReader(path, side_file(file.getvalue()), None, 2) as reader:
                assert reader.keys == ["a", "b"] and reader.photo(1) == members[2][1]
            continue
        with pytest.raises(AmpError, match=problem):
            ShardReader(path, side_file(file.getvalue()), None, 2)
    with pytest.raises(AmpError, match=r"x.index.npy: sha256 is \w+; expected"):
        ShardReader(path, side_file(b"another"), None, 2)
