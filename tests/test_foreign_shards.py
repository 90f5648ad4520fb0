"""Tar files of img2dataset, CLIP_benchmark, open_clip and FLAIR: converted, or indexed as they are."""

import hashlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open
from support.commands import Canary
from support.drawn_data import draw, draw_dataset
from support.foreign_tars import clip_benchmark, clip_benchmark_tars, img2dataset, photos_of, with_json
from support.photos import encoded
from support.repository import QUIET_ENVIRONMENT, ROOT, run_here
from support.tars import tar_of

from amp.data.conversion.index_tar import index_tar
from amp.data.conversion.make import make_shards
from amp.data.conversion.rewrite import rewrite_knowledge
from amp.data.conversion.tars import INDEXED, index_shards
from amp.data.foreign.names import find_tars
from amp.data.foreign.stream import PhotoStream
from amp.data.shards import ShardManifest
from amp.data.shards.index import index_of, records_of
from amp.errors import AmpError
from amp.terminal import PlainConsole

QUIET = PlainConsole(quiet=True)
PHOTOS = [encoded(draw(n)) for n in range(9)]

index = partial(index_shards, workers=1, console=QUIET)


def convert(captions, out, **options):
    return make_shards(str(captions), None, str(out), **{"workers": 1, "console": QUIET, **options})


def samples(root: Path, split: str = "train") -> list[tuple[bytes, dict]]:
    """Photo and record of each sample of a split, in order."""
    found = []
    for shard in ShardManifest.load(root).split(split):
        with shard.open() as reader:
            found += [reader.read(n) for n in range(len(reader))]
    return found


def texts(root: Path, split: str = "train") -> dict[str, list[str]]:
    """The captions of each sample by its file name."""
    return {record["filename"]: [c["text"] for c in record["captions"]] for _, record in samples(root, split)}


def skipped(manifest: ShardManifest) -> dict[str, list[str]]:
    return {kind: [entry["file"] for entry in entries] for kind, entries in manifest.skipped.items() if entries}


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder that a reader of shards opens, except the manifest, whose provenance has the command."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.suffix != ".json"}


@pytest.fixture
def tars(tmp_path) -> tuple[dict[str, str], Path]:
    """(arguments of make_shards for 11 drawn photos, folder with the same photos as 3 tar files)."""
    dataset = draw_dataset(tmp_path / "drawn", {"train": 11})
    knowledge = Path(dataset["knowledge"])
    lines = [json.loads(line) for line in knowledge.read_text().splitlines()]
    for line in lines:
        del line["image"]  # CLIP_benchmark numbers the photos anew
    knowledge.write_text("".join(json.dumps(line) + "\n" for line in lines))
    clip_benchmark_tars(tmp_path / "tars", photos_of(dataset), 4)
    return dataset, tmp_path / "tars"


# Both roads


def test_both_roads_give_the_records_of_make_shards(tars, tmp_path):
    dataset, folder = tars
    before = contents(folder)
    make_shards(**dataset, out=str(tmp_path / "own"), samples_per_shard=4, workers=1, console=QUIET)
    converted = convert(folder, tmp_path / "converted", knowledge=dataset["knowledge"])
    indexed = index(f"{folder}/{{0..2}}.tar", knowledge=dataset["knowledge"])
    own = {record["captions"][0]["id"]: (photo, record) for photo, record in samples(tmp_path / "own")}
    ours = samples(tmp_path / "converted")
    assert ours == samples(folder) and len(ours) == len(own) == 11
    for photo, record in ours:
        its_photo, its_record = own[record["captions"][0]["id"]]
        assert photo == its_photo and record["captions"] == its_record["captions"]
        assert record.keys() == its_record.keys()
    assert any(caption["triplets"] for _, record in ours for caption in record["captions"])
    assert [record["key"] for _, record in ours] == [f"s{n:07d}" for n in range(11)]
    assert ours[3][1]["image_id"] == "s0000003" and ours[3][1]["filename"] == "s0000003.jpg"
    # The same bytes in both forms, and tar files that are only read.
    with tarfile.open(tmp_path / "converted" / "train-000001.tar") as tar:
        records = [tar.extractfile(m).read() for m in tar if m.name.endswith(".json")]
    assert b"\n".join(records) + b"\n" == records_of(folder / "1.tar").read_bytes()
    assert {name: content for name, content in contents(folder).items() if name in before} == before
    assert [shard.name for shard in converted.split("train")] == [f"train-00000{n}.tar" for n in range(3)]
    assert [shard.samples for shard in indexed.split("train")] == [4, 4, 3]
    for manifest in (converted, indexed):
        manifest.verify()
        assert manifest.captions_without_knowledge == {"train": 0}
        expected = [{"file": f"{n}.tar", "sha256": hashlib.sha256(before[f"{n}.tar"]).hexdigest()} for n in range(3)]
        given = [{key: entry[key] for key in ("file", "sha256")} for entry in manifest.provenance["tars"]]
        assert given == expected
        assert manifest.provenance["knowledge"]["captions_with_knowledge"] == 21
        assert ShardManifest.load(manifest.root).to_dict() == json.loads((manifest.root / "manifest.json").read_text())
    assert manifest.splits["train"][0].sha256 == expected[0]["sha256"]


@pytest.mark.system
def test_training_on_both_gives_the_same_bits(tars, tmp_path, clip_folder):
    from support.training_run import small_run

    from amp.train.config import StageSettings
    from amp.train.engine import train

    dataset, folder = tars
    convert(folder, tmp_path / "converted", knowledge=dataset["knowledge"])
    index(str(folder), knowledge=dataset["knowledge"])
    adapters = []
    for root in (tmp_path / "converted", folder):
        root.rename(tmp_path / "data")  # the adapter's header has the paths
        settings = {"stage1": StageSettings(max_steps=2), "stages": [1]}
        config = small_run(tmp_path / "data", clip_folder, tmp_path, {"batch_size": 4}, **settings)
        with safe_open(train(config), "np") as file:
            tensors = {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118
            adapters.append((tensors, file.metadata()))
        (tmp_path / "data").rename(tmp_path / f"done{len(adapters)}")
        shutil.rmtree(tmp_path / "run")
    assert adapters[0] == adapters[1] and adapters[0][0]


def test_resized_photos(tars, tmp_path):
    _, folder = tars
    manifest = convert(folder, tmp_path / "small", resize=12, resize_mode="squash")
    assert {Image.open(io.BytesIO(photo)).size for photo, _ in samples(tmp_path / "small")} == {(12, 12)}
    assert manifest.provenance["resize"] == {"size": 12, "mode": "squash", "quality": 95}


# Captions


def test_img2dataset(tmp_path):
    """One caption per .txt, also with line breaks in it; img2dataset's key is the image's id."""
    members = [
        *img2dataset(0, PHOTOS[0], "A dog\nruns"),
        *img2dataset(1, PHOTOS[1], "A cat", key="other"),
        *img2dataset(2, PHOTOS[2], "failed", status="failed_to_download"),
        *img2dataset(3, PHOTOS[3], "  "),
        *img2dataset(4, PHOTOS[4], "no photo")[1:],
        *img2dataset(5, PHOTOS[5], "A bird", key="\ud800"),
    ]
    tar_of(tmp_path / "00000.tar", *members)
    manifest = index(str(tmp_path / "00000.tar"), max_skipped=0.7)
    assert texts(tmp_path) == {
        "000000000.jpg": ["A dog\nruns"],
        "000000001.jpg": ["A cat"],
        "000000005.jpg": ["A bird"],
    }
    records = [record for _, record in samples(tmp_path)]
    assert [record["image_id"] for record in records] == ["000000000", "other", "000000005"]
    # All captions of the tar file are numbered, as in captions files.
    assert [record["captions"][0]["id"] for record in records] == [0, 1, 5]
    assert skipped(manifest) == {
        "missing_image": ["00000.tar/000000002.jpg", "00000.tar/000000004.txt"],
        "empty_caption": ["00000.tar/000000003.jpg"],
        "image_without_caption": ["00000.tar/000000003.jpg"],
    }
    assert "'failed_to_download'; expected 'success'" in manifest.skipped["missing_image"][0]["reason"]
    # A tar file without a usable sample has no shard.
    tar_of(tmp_path / "00001.tar", *img2dataset(6, PHOTOS[6], ""))
    for manifest in (
        index(str(tmp_path), max_skipped=0.7),
        convert(tmp_path, tmp_path / "out", max_skipped=0.7),
    ):
        assert [shard.samples for shard in manifest.splits["train"]] == [3]
        assert len(manifest.provenance["tars"]) == 2
    assert not index_of(tmp_path / "00001.tar").exists()
    with pytest.raises(AmpError, match=r"00000.tar: 3 of 6 images .* above --max_skipped 0.01; no manifest"):
        convert(tmp_path / "00000.tar", tmp_path / "out")


def test_clip_benchmark_lines_are_those_that_it_reads(tmp_path):
    """It escapes line breaks when it writes, doesn't undo that when it reads, and reads with str.splitlines."""
    captions = ["A dog\nruns", "A cat\u2028sits", " A bird "]
    sample = clip_benchmark(0, encoded(draw(0), "WEBP", lossless=True), captions, "webp")
    tar_of(tmp_path / "0.tar", *sample)
    index(str(tmp_path / "0.tar"))
    read = [line.strip() for line in sample[1][1].decode().splitlines()]
    assert read == ["A dog\\nruns", "A cat", "sits", "A bird"]
    assert texts(tmp_path) == {"s0000000.webp": read}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (None, ["A dog"]),
        (["caption"], ["A dog"]),
        (["raw_caption", "longIB_captions"], ["Raw", "Long 1", "Long 2"]),
        (["longIB_captions", "caption"], ["Long 1", "Long 2", "A dog"]),
    ],
)
def test_keys_of_json(tmp_path, keys, expected):
    record = {"caption": "A dog", "raw_caption": "Raw", "longIB_captions": ["Long 1", "Long 2"], "url": "x"}
    tar_of(tmp_path / "0.tar", *with_json("folder/a", PHOTOS[0], record), *with_json("b", PHOTOS[1], record))
    shown = io.StringIO()
    index_shards(str(tmp_path), caption_keys=keys, workers=1, console=PlainConsole(file=shown))
    assert texts(tmp_path) == {"folder/a.jpg": expected, "b.jpg": expected}
    assert f"captions read from JSON key {(keys or ['caption'])[0]!r} (2 samples)" in shown.getvalue()


def test_chosen_keys_come_before_the_txt(tmp_path):
    tar_of(tmp_path / "0.tar", *img2dataset(0, PHOTOS[0], "of the txt", long_caption="of the json"))
    index(str(tmp_path), caption_keys=["long_caption"])
    assert texts(tmp_path) == {"000000000.jpg": ["of the json"]}


def test_a_key_that_no_sample_has(tmp_path):
    tar_of(tmp_path / "0.tar", *with_json("a", PHOTOS[0], {"caption": "A dog"}))
    with pytest.raises(AmpError, match=r"no .json has the key 'captoin' of --caption_keys; keys seen: .*caption"):
        index(str(tmp_path), caption_keys=["caption", "captoin"])
    tar_of(tmp_path / "0.tar", *with_json("a", PHOTOS[0], {"alt": "A dog"}))
    with pytest.raises(AmpError, match=r"no photo with a caption in it; .*keys seen in .json: alt; choose others with"):
        index(str(tmp_path))


@pytest.mark.parametrize(
    ("members", "kind", "reason"),
    [
        ([("a.jpg", PHOTOS[0]), ("a.json", b"{")], "image_without_caption", "the .json isn't JSON"),
        (
            [("a.jpg", PHOTOS[0]), ("a.json", b"[1]")],
            "image_without_caption",
            r"the .json is \[1\]; expected an object",
        ),
        ([("a.jpg", PHOTOS[0]), ("a.txt", b"\xff")], "image_without_caption", "the .txt isn't UTF-8"),
        (with_json("a", PHOTOS[0], {"caption": 7}), "image_without_caption", "'caption' is 7; expected a string"),
        (with_json("a", PHOTOS[0], {"caption": [{}]}), "image_without_caption", r"'caption'\[0\] is {}; expected a st"),
        ([("a.jpg", PHOTOS[0])], "image_without_caption", "it has no caption"),
        ([("a.txt", b"A dog")], "missing_image", "no photo in the tar file"),
        ([("a.jp2", b""), ("a.txt", b"A dog")], "unreadable_image", "JPEG 2000 is not supported"),
        ([("a.seg.png", b""), ("a.txt", b"A dog")], "missing_image", "no photo in the tar file"),
        ([("a.jpg", PHOTOS[0][:500]), ("a.txt", b"A dog")], "unreadable_image", "truncated|damaged"),
        ([("a.jpg", b""), ("a.txt", b"A dog")], "unreadable_image", "0 bytes"),
    ],
)
@pytest.mark.parametrize("road", ["convert", "index"])
def test_what_is_skipped(tmp_path, members, kind, reason, road):
    good = with_json("b", PHOTOS[1], {"caption": "A cat"})
    tar_of(tmp_path / "0.tar", *members, *good)
    options = {"max_skipped": 0.6}
    manifest = convert(tmp_path, tmp_path / "out", **options) if road == "convert" else index(str(tmp_path), **options)
    assert texts(manifest.root) == {"b.jpg": ["A cat"]}
    assert samples(manifest.root)[0][0] == PHOTOS[1]
    assert list(skipped(manifest)) == [kind]
    entry = manifest.skipped[kind][0]
    assert entry["file"].startswith("0.tar/a.") and re.search(reason, entry["reason"]), entry


def test_keys_are_unique_and_sanitised(tmp_path):
    """Tools that number the samples of each tar file from 0."""
    for n in (0, 1):
        sample = with_json("x/ü 1", PHOTOS[n], {"caption": f"A dog {n}"})
        tar_of(tmp_path / f"{n}.tar", *sample, *with_json(f"own{n}", PHOTOS[n], {"caption": "A cat"}))
    index(str(tmp_path))
    records = [record for _, record in samples(tmp_path)]
    keys = [record["key"] for record in records]
    assert len(set(keys)) == 4 and keys[1::2] == ["own0", "own1"] and all(key.startswith("__1-") for key in keys[::2])
    assert len({record["image_id"] for record in records}) == 4 and records[1]["image_id"] == "own0"
    assert [photo for photo, _ in samples(tmp_path)] == [PHOTOS[0], PHOTOS[0], PHOTOS[1], PHOTOS[1]]
    convert(tmp_path, tmp_path / "out")
    assert samples(tmp_path / "out") == samples(tmp_path)


# Names of tar files


def test_names(tmp_path):
    for n in (0, 2, 10):
        tar_of(tmp_path / f"{n}.tar")
    names = lambda text: [path.name for path in find_tars(text)]  # noqa: E731
    assert names(str(tmp_path)) == names(f"{tmp_path}/*.tar") == ["0.tar", "2.tar", "10.tar"]
    assert names(f"{tmp_path}/{{10,2}}.tar") == ["10.tar", "2.tar"]
    assert names(f"{tmp_path}/2.tar") == ["2.tar"]
    assert names(f"{tmp_path}/{{1,}}*.tar") == ["10.tar", "0.tar", "2.tar"]  # each file once
    (tmp_path / "{0..1}.tar").write_bytes(b"")
    assert names(f"{tmp_path}/{{0..1}}.tar") == ["{0..1}.tar"]
    with pytest.raises(
        AmpError, match=r"/1.tar: can't be read \(no such file\); expected a tar file; give a tar file, a"
    ):
        find_tars(f"{tmp_path}/{{0..2}}.tar")
    with pytest.raises(AmpError, match=r"none\*.tar: can't be read \(no \*.tar matches\)"):
        find_tars(f"{tmp_path}/none*.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AmpError, match=r"empty: can't be read \(no \*.tar matches\)"):
        find_tars(str(tmp_path / "empty"))


def test_shards_of_our_own_are_not_foreign(tars, tmp_path):
    dataset, _ = tars
    make_shards(**dataset, out=str(tmp_path / "own"), workers=1, console=QUIET)
    for road in (lambda: convert(tmp_path / "own", tmp_path / "x"), lambda: index(str(tmp_path / "own"))):
        with pytest.raises(AmpError, match=r"own: contains shards of amp make_shards .train-000000.tar.; expected tar"):
            road()


# Hostile tar files


def special(name, kind, target="/etc/passwd"):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


GOOD = [*clip_benchmark(0, PHOTOS[0], ["A dog"]), *clip_benchmark(1, PHOTOS[1], ["A cat"])]


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([special("a.jpg", tarfile.SYMTYPE)], "'a.jpg' is a link, a folder or a device"),
        ([special("a.jpg", tarfile.LNKTYPE, "s0000000.jpg")], "is a link, a folder or a device"),
        ([special("a.jpg", tarfile.CHRTYPE)], "is a link, a folder or a device"),
        ([special("a.jpg", tarfile.FIFOTYPE)], "is a link, a folder or a device"),
        ([("/a.jpg", PHOTOS[2])], "absolute or parent path"),
        ([("x/../../a.jpg", PHOTOS[2])], "absolute or parent path"),
        ([("s0000001.jpg", PHOTOS[2])], "key 's0000001' has two photos; expected each key once"),
        ([("s0000001.png", PHOTOS[2])], "key 's0000001' has two photos"),
        ([("s0000001.txt", b"A")], "key 's0000001' occurs twice"),
        ([("s0000000.json", b"{}")], "key 's0000000' occurs twice"),
    ],
)
@pytest.mark.parametrize("road", ["convert", "index"])
def test_hostile_members(tmp_path, members, words, road):
    tar = tar_of(tmp_path / "0.tar", *GOOD, *members)
    with pytest.raises(AmpError, match=words) as error:
        convert(tar, tmp_path / "out") if road == "convert" else index(str(tar))
    assert str(error.value).startswith(f"{tar}: ") and str(error.value).endswith(
        "correct the tar file, or leave it out"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.tar"]


@pytest.mark.parametrize("name", ["a.pyd", "a.pickle", "a.pkl", "s0000001.pth", "a.x.PYD", "a.pt"])
def test_pickles_are_never_read(tmp_path, name):
    tar_of(tmp_path / "0.tar", *GOOD, (name, pickle.dumps(Canary(tmp_path / "canary"))))
    for road in (lambda: convert(tmp_path, tmp_path / "out"), lambda: index(str(tmp_path))):
        with pytest.raises(AmpError, match=f"'{name}' is a pickle, which could run code; .*pickles are never read"):
            road()
    assert not (tmp_path / "canary").exists()


def test_other_members_are_reported_and_not_read(tmp_path):
    others = [("s0000001.cls", b"7"), ("README", b"x"), ("__meta__", b"x"), special("folder", tarfile.DIRTYPE)]
    tar_of(tmp_path / "0.tar", *GOOD, *others)
    shown = io.StringIO()
    index_shards(str(tmp_path), workers=1, console=PlainConsole(file=shown))
    assert "members not read: names without an extension (2), .cls (1)" in shown.getvalue()
    assert len(samples(tmp_path)) == 2
    assert samples(convert(tmp_path, tmp_path / "out").root) == samples(tmp_path)


def test_every_cut_is_noticed(tmp_path):
    whole = tar_of(tmp_path / "0.tar", *GOOD).read_bytes()
    end = len(whole.rstrip(b"\0"))
    end += -end % 512 + 1024
    for size in range(0, end, 512):
        (tmp_path / "0.tar").write_bytes(whole[:size])
        with pytest.raises(AmpError, match=r"0\.tar: "):
            index(str(tmp_path / "0.tar"))
    assert not (tmp_path / "manifest.json").exists()


def test_other_files_called_tar(tmp_path):
    tar_of(tmp_path / "0.tar", *GOOD, mode="w:gz")
    with pytest.raises(AmpError, match=r"0.tar: not a readable tar file .* expected an uncompressed tar shard"):
        index(str(tmp_path / "0.tar"))
    os.mkfifo(tmp_path / "1.tar")
    with pytest.raises(AmpError, match=r"1.tar: can't be read"):
        convert(tmp_path / "1.tar", tmp_path / "out")
    tar_of(tmp_path / "2.tar")
    with pytest.raises(AmpError, match=r"2.tar: no photo with a caption in it"):
        index(str(tmp_path / "2.tar"))


def test_names_never_start_programs(tmp_path, monkeypatch):
    """webdataset would run the rest of a name that begins with `pipe:`."""
    monkeypatch.chdir(tmp_path)
    name = "pipe:touch canary #.tar"
    tar_of(tmp_path / name, *GOOD)
    assert len(samples(index(name).root)) == len(samples(convert(name, "out").root)) == 2
    assert not (tmp_path / "canary").exists()


def test_a_tar_file_that_changes_while_it_is_read(tmp_path):
    tar = tar_of(tmp_path / "0.tar", *GOOD)
    tar.write_bytes(tar.read_bytes() + bytes(30_000))  # more padding than tarfile reads
    names = ["s0000000.jpg", "s0000001.jpg"]
    photos = PhotoStream(tar, names)
    assert list(photos) == PHOTOS[:2]
    assert (photos.file.bytes, photos.file.sha256) == (
        tar.stat().st_size,
        hashlib.sha256(tar.read_bytes()).hexdigest(),
    )
    for wrong in (names[::-1], [*names, "s0000002.jpg"]):
        with pytest.raises(AmpError, match=r"0.tar: changed while it was read .*out of order|is missing"):
            list(PhotoStream(tar, wrong))
    tar.write_bytes(tar.read_bytes()[:1500])
    with pytest.raises(AmpError, match=r"0.tar: changed while it was read"):
        list(PhotoStream(tar, names))


# Splits


def test_splits_of_several_calls(tmp_path):
    for n in range(4):
        tar_of(
            tmp_path / f"{n}.tar", *clip_benchmark(n, PHOTOS[n], [f"A dog {n}", "A cat"]), *with_json(f"x{n}", b"", {})
        )
    limit = {"max_skipped": 0.5}
    index(f"{tmp_path}/{{0..1}}.tar", **limit)
    manifest = index(f"{tmp_path}/2.tar", split="validation", **limit)
    assert list(manifest.splits) == ["train", "val"] and list(texts(tmp_path, "val")) == ["s0000002.jpg"]
    assert [record["split"] for _, record in samples(tmp_path, "val")] == ["val"]
    assert skipped(manifest) == {"image_without_caption": ["0.tar/x0.jpg", "1.tar/x1.jpg", "2.tar/x2.jpg"]}
    sources = manifest.provenance["splits"]
    assert [[tar["file"] for tar in sources[split]["tars"]] for split in ("train", "val")] == [
        ["0.tar", "1.tar"],
        ["2.tar"],
    ]
    with pytest.raises(
        AmpError, match=r"manifest.json: 2.tar is in split 'val'; expected each tar file, and each name, in"
    ):
        index(f"{tmp_path}/{{1..2}}.tar", **limit)
    manifest = index(f"{tmp_path}/{{1,3}}.tar", **limit)
    assert list(texts(tmp_path)) == ["s0000001.jpg", "s0000003.jpg"] and list(manifest.splits) == ["val", "train"]
    assert skipped(manifest) == {"image_without_caption": ["2.tar/x2.jpg", "1.tar/x1.jpg", "3.tar/x3.jpg"]}
    # What the earlier call wrote for 0.tar is gone, the tar file isn't.
    assert sorted(path.name for path in tmp_path.glob("0.*")) == ["0.tar"]
    assert not (tmp_path / ".index" / "0.tar.json").exists() and index_of(tmp_path / "2.tar").exists()

    out = tmp_path / "out"
    convert(f"{tmp_path}/{{0..1}}.tar", out, **limit)
    manifest = convert(f"{tmp_path}/2.tar", out, split="test", **limit)
    assert list(manifest.splits) == ["train", "test"] and manifest.captions("train") == 4
    manifest = convert(f"{tmp_path}/3.tar", out, **limit)
    assert list(texts(out)) == ["s0000003.jpg"] and list(texts(out, "test")) == ["s0000002.jpg"]
    assert sorted(path.name for path in out.glob("*.tar")) == ["test-000000.tar", "train-000000.tar"]
    manifest.verify()


def test_an_unfinished_split_leaves_the_others(tars, monkeypatch, tmp_path):
    _, folder = tars
    index(f"{folder}/0.tar", split="val")
    seen = []

    def stops(plan, *arguments):
        seen.append(plan)
        if len(seen) == 2:
            raise KeyboardInterrupt
        index_tar(plan, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr("amp.data.conversion.tars.INDEXED", replace(INDEXED, write=stops))
        with pytest.raises(KeyboardInterrupt):
            index(f"{folder}/{{1..2}}.tar")
    assert list(ShardManifest.load(folder).splits) == ["val"]
    before = index_of(folder / "1.tar").stat().st_mtime_ns
    assert list(index(f"{folder}/{{1..2}}.tar").splits) == ["val", "train"]
    assert index_of(folder / "1.tar").stat().st_mtime_ns == before


# Other folders


def test_tars_that_are_only_read(tars, tmp_path, monkeypatch):
    dataset, folder = tars
    before = contents(folder)
    monkeypatch.chdir(tmp_path)
    manifest = index("tars", out="side", knowledge=dataset["knowledge"])
    assert contents(folder) == before and not (folder / "manifest.json").exists()
    assert sorted(contents(tmp_path / "side")) == sorted(
        f"{n}.{x}" for n in range(3) for x in ("index.npy", "records.jsonl")
    )
    content = json.loads(Path("side/manifest.json").read_text())
    assert content["splits"]["train"]["tars"] == str(folder)
    index(str(folder), knowledge=dataset["knowledge"])
    monkeypatch.chdir(tmp_path / "side")
    assert samples(Path(".")) == samples(folder) and len(samples(Path("."))) == 11
    ShardManifest.load(".").verify()
    own = ShardManifest.load(folder).splits["train"][0]
    assert (manifest.splits["train"][0].photos, manifest.splits["train"][0].texts) == (own.photos, own.texts)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("tars", "splits.train: 'tars' is 'tars'; expected the absolute path of the folder of the tar files"),
        ("/a\0b", "expected the absolute path"),
        (7, "'tars' is 7; expected a string"),
    ],
)
def test_the_folder_of_the_tars_is_checked(tars, tmp_path, value, words):
    _, folder = tars
    index(str(folder), out=str(tmp_path / "side"))
    path = tmp_path / "side" / "manifest.json"
    content = json.loads(path.read_text())
    content["splits"]["train"]["tars"] = value
    path.write_text(json.dumps(content))
    with pytest.raises(AmpError, match=words):
        ShardManifest.load(tmp_path / "side")
    content["splits"]["train"]["tars"] = str(tmp_path / "nowhere")
    path.write_text(json.dumps(content))
    with pytest.raises(AmpError, match=r"nowhere/0.tar: No such file or directory, but .*manifest.json lists it"):
        ShardManifest.load(tmp_path / "side").split("train")
    del content["splits"]["train"]["shards"][0]["records"]
    path.write_text(json.dumps(content))
    with pytest.raises(AmpError, match=r"shards\[0\]: key 'records' is missing; expected it in a split with 'tars'"):
        ShardManifest.load(tmp_path / "side")


def test_folders_that_would_be_damaged(tars, tmp_path):
    dataset, folder = tars
    index(str(folder))
    before = contents(folder)
    with pytest.raises(AmpError, match="tars: contains tar files that this tool didn't make"):
        make_shards(**dataset, out=str(folder), workers=1, console=QUIET)
    with pytest.raises(AmpError, match="tars: contains tar files that this tool didn't make"):
        convert(folder, folder)
    (tmp_path / "side").mkdir()
    index(str(folder), out=str(tmp_path / "side"))
    with pytest.raises(AmpError, match="side: contains what amp index_shards wrote; expected a folder without it"):
        convert(folder, tmp_path / "side")
    make_shards(**dataset, out=str(tmp_path / "own"), workers=1, console=QUIET)
    with pytest.raises(AmpError, match="own: contains what amp make_shards wrote"):
        index(str(folder), out=str(tmp_path / "own"))
    assert contents(folder) == before
    other = tmp_path / "other"
    other.mkdir()
    (folder / "0.tar").rename(other / "0.tar")
    with pytest.raises(AmpError, match=r"tar files in 2 folders, first .*other and .*tars; expected one folder"):
        index(f"{tmp_path}/{{other,tars}}/*.tar")
    assert len(samples(convert(f"{tmp_path}/{{other,tars}}/*.tar", tmp_path / "both").root)) == 11


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"images": "x"},
            "tar files, but --images is given; expected none, because all samples of tar files are taken",
        ),
        ({"limit": 3}, "--limit is given"),
        ({"splits": ["train"]}, "--splits is given"),
        ({"default_split": "val"}, "--default_split is given"),
        ({"max_skipped": 2}, "max_skipped is 2"),
        ({"part": "2/2"}, "part is '2/2'"),
        ({"split": "../x"}, r"--split: 'split' is '../x'"),
    ],
)
def test_options_that_cannot_be_used(tars, tmp_path, options, words):
    _, folder = tars
    with pytest.raises(AmpError, match=words):
        make_shards(**{"captions": str(folder), "images": None, "out": str(tmp_path / "out"), **options}, console=QUIET)
    assert not (tmp_path / "out").exists()


def test_options_for_tars_alone(tars, tmp_path):
    dataset, _ = tars
    for options, words in (
        ({"split": "val"}, "a captions file, but --split is given; expected none, because this option is for tar"),
        ({"caption_keys": ["caption"]}, "--caption_keys is given"),
    ):
        with pytest.raises(AmpError, match=words):
            make_shards(**{**dataset, "out": str(tmp_path / "out"), **options}, console=QUIET)


# Resuming


def times(folder: Path, pattern: str) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob(pattern)}


@pytest.mark.parametrize("road", ["convert", "index"])
def test_only_what_is_missing_is_written(tars, tmp_path, road):
    dataset, folder = tars
    target = tmp_path / "out" if road == "convert" else folder
    pattern = "*.tar" if road == "convert" else "*.records.jsonl"
    run = partial(convert, folder, target) if road == "convert" else partial(index, str(folder))
    run()
    before, content = times(target, pattern), contents(target)
    run()
    assert times(target, pattern) == before
    changed = sorted(before)[1]
    (target / changed).unlink()
    run()
    after = times(target, pattern)
    assert [name for name in before if after[name] != before[name]] == [changed] and contents(target) == content
    run(knowledge=dataset["knowledge"])  # every record changes
    assert all(times(target, pattern)[name] != after[name] for name in after)
    # A tar file with another photo: only its shard is written again.
    after = times(target, pattern)
    tar_of(folder / "2.tar", *clip_benchmark(8, PHOTOS[5], ["A dog", "A cat"]))
    run()
    assert samples(target)[-1][0] == PHOTOS[5]
    ShardManifest.load(target).verify()


@pytest.mark.parametrize("road", ["convert", "index"])
def test_parts(tars, tmp_path, road):
    _, folder = tars
    target = tmp_path / "out"
    run = partial(convert, folder, target) if road == "convert" else partial(index, str(folder), out=str(target))
    for part in ("1/2", "0/2", "1/2"):
        assert run(part=part) is None
        assert not (target / "manifest.json").exists()
    suffix = "*.tar" if road == "convert" else "*.records.jsonl"
    assert len(list(target.glob(suffix))) == 3
    before = times(target, suffix)
    run().verify()
    assert times(target, suffix) == before
    whole = tmp_path / "whole"
    convert(folder, whole) if road == "convert" else index(str(folder), out=str(whole))
    assert contents(whole) == contents(target)


@pytest.mark.system
@pytest.mark.parametrize("road", ["convert", "index"])
def test_several_workers_write_the_same(tars, tmp_path, road, monkeypatch):
    _, folder = tars
    monkeypatch.setattr("amp.data.conversion.tars.TARS_PER_PROCESS", 1)
    for workers in (1, 2):
        out = str(tmp_path / f"out{workers}")
        convert(folder, out, workers=workers) if road == "convert" else index(str(folder), out=out, workers=workers)
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")


KILLED = """
import os, sys, time
from amp.data.conversion import write
from amp.data.conversion.index_tar import index_tar
from amp.data.conversion.make import make_shards
from amp.data.conversion.tars import index_shards
from amp.terminal import PlainConsole
real, calls = write.checked_image, []
def dies(*arguments):
    calls.append(arguments)
    if len(calls) == 6: os.kill(os.getpid(), 9)
    return real(*arguments)
write.checked_image = dies
road, tars, out = sys.argv[1:]
options = {"workers": 1, "console": PlainConsole(quiet=True)}
make_shards(tars, None, out, **options) if road == "convert" else index_shards(tars, out=out, **options)
"""


@pytest.mark.system
@pytest.mark.parametrize("road", ["convert", "index"])
def test_killed_and_finished(tars, tmp_path, road):
    _, folder = tars
    out, whole = tmp_path / "out", tmp_path / "whole"
    run = (lambda to: convert(folder, to)) if road == "convert" else (lambda to: index(str(folder), out=str(to)))
    done = subprocess.run([sys.executable, "-c", KILLED, road, folder, out], env=QUIET_ENVIRONMENT, cwd=ROOT)
    assert done.returncode == -signal.SIGKILL and not (out / "manifest.json").exists()
    first = "train-000000.*" if road == "convert" else "0.*"
    before = times(out, first)
    assert len(before) == 2
    run(out).verify()
    run(whole)
    assert contents(out) == contents(whole) and not list(out.rglob("*.tmp"))
    assert before.items() <= times(out, first).items()


# Knowledge


def new_knowledge(records: list[dict], path: Path, word: str = "new") -> Path:
    lines = []
    for record in records:
        for caption in record["captions"]:
            triplets = [{"subject": "thing", "action": word, "object": str(caption["id"])}][: caption["id"] % 3]
            place = {"sentid": caption["id"], "image": record["filename"], "caption": caption["text"]}
            lines.append({**place, "triplets": triplets, "states": [f"It is {word} and looks so."] * len(triplets)})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("to", ["in place", "elsewhere"])
@pytest.mark.parametrize("side", [False, True])
def test_knowledge_is_rewritten_next_to_the_tars(tars, tmp_path, side, to):
    dataset, folder = tars
    root = tmp_path / "side" if side else folder
    index(str(folder), out=str(root), knowledge=dataset["knowledge"])
    before = contents(folder), contents(root)
    knowledge = new_knowledge([record for _, record in samples(root)], tmp_path / "new.jsonl")
    out = None if to == "in place" else str(tmp_path / "rewritten")
    manifest = rewrite_knowledge(str(root), str(knowledge), out=out, console=QUIET)
    target = manifest.root
    index(str(folder), out=str(tmp_path / "scratch"), knowledge=str(knowledge))
    assert samples(target) == samples(tmp_path / "scratch") != []
    expected = contents(tmp_path / "scratch")
    assert {name: content for name, content in contents(target).items() if not name.endswith(".tar")} == expected
    assert {n: c for n, c in contents(folder).items() if n.endswith(".tar")} == {
        n: c for n, c in before[0].items() if n.endswith(".tar")
    }
    if to == "elsewhere":
        assert contents(root) == before[1]
    manifest.verify()
    assert manifest.to_dict() == ShardManifest.load(target).to_dict()
    assert manifest.provenance["knowledge"]["file"] == "new.jsonl"
    assert manifest.provenance["splits"]["train"]["knowledge"]["file"] == "new.jsonl"
    assert [entry["file"] for entry in manifest.provenance["previous_knowledge"]] == ["knowledge.jsonl"]
    # Indexing again gives what the index's own arguments say.
    again = index(str(folder), out=str(target), knowledge=dataset["knowledge"])
    assert samples(target) == samples(convert(folder, tmp_path / "c", knowledge=dataset["knowledge"]).root)
    again.verify()


def test_knowledge_is_rewritten_in_converted_tars(tars, tmp_path):
    dataset, folder = tars
    out = tmp_path / "out"
    convert(folder, out, knowledge=dataset["knowledge"])
    knowledge = new_knowledge([record for _, record in samples(out)], tmp_path / "new.jsonl")
    rewrite_knowledge(str(out), str(knowledge), console=QUIET).verify()
    convert(folder, tmp_path / "scratch", knowledge=str(knowledge))
    assert contents(out) == contents(tmp_path / "scratch")


@pytest.mark.parametrize("moment", ["the sidecar", "the index", "the records"])
@pytest.mark.parametrize("last", ["one", "another"])  # with indexes that differ
def test_a_rewrite_that_stops_is_finished(tars, tmp_path, monkeypatch, moment, last):
    """Stopped before a file of the second tar file gets its name, over another rewrite that was stopped after it."""
    dataset, folder = tars
    index(str(folder), knowledge=dataset["knowledge"])
    records = [record for _, record in samples(folder)]
    files = {word: str(new_knowledge(records, tmp_path / f"{word}.jsonl", word)) for word in ("one", "another")}
    ending = {"the sidecar": "1.tar.json", "the index": "1.index.npy", "the records": "1.records.jsonl"}

    def interrupted(word, name, after):
        real = os.replace

        def stop(source, target):
            if str(target).endswith(name) and not after:
                raise KeyboardInterrupt
            real(source, target)
            if str(target).endswith(name):
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stop)
            with pytest.raises(KeyboardInterrupt):
                rewrite_knowledge(str(folder), files[word], console=QUIET)
        assert not (folder / "manifest.json").exists()

    interrupted("one", "1.records.jsonl", after=True)
    interrupted("another", ending[moment], after=False)
    rewrite_knowledge(str(folder), files[last], console=QUIET).verify()
    index(str(folder), out=str(tmp_path / "scratch"), knowledge=files[last])
    assert samples(folder) == samples(tmp_path / "scratch")
    written = times(folder, "*.records.jsonl")
    rewrite_knowledge(str(folder), files[last], console=QUIET)
    assert times(folder, "*.records.jsonl") == written


SLOW_REWRITE = """
import sys, time
from amp.data.conversion import rewrite
from amp.terminal import PlainConsole
real = rewrite.whole_file
def slow(*arguments, **options):
    print("writing", flush=True)
    time.sleep(0.02)
    return real(*arguments, **options)
rewrite.whole_file = slow
rewrite.rewrite_knowledge(*sys.argv[1:], console=PlainConsole(quiet=True))
"""


@pytest.mark.system
def test_a_rewrite_is_killed_at_any_time(tars, tmp_path):
    dataset, folder = tars
    index(str(folder), knowledge=dataset["knowledge"])
    records = [record for _, record in samples(folder)]
    files = [str(new_knowledge(records, tmp_path / f"{word}.jsonl", word)) for word in ("one", "another")]
    unfinished = 0
    for turn in range(10):
        script = [sys.executable, "-c", SLOW_REWRITE, str(folder), files[turn % 2]]
        process = subprocess.Popen(script, env=QUIET_ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"writing\n"
        time.sleep(0.013 * turn)
        process.kill()
        process.communicate()
        unfinished += not (folder / "manifest.json").exists()
    assert unfinished >= 6
    rewrite_knowledge(str(folder), files[0], console=QUIET).verify()
    index(str(folder), out=str(tmp_path / "scratch"), knowledge=files[0])
    assert samples(folder) == samples(tmp_path / "scratch") and not list(folder.rglob("*.tmp"))


def test_a_changed_index_is_refused(tars, tmp_path):
    _, folder = tars
    index(str(folder))
    knowledge = new_knowledge([record for _, record in samples(folder)], tmp_path / "new.jsonl")
    content = bytearray(index_of(folder / "1.tar").read_bytes())
    content[-1] ^= 1
    index_of(folder / "1.tar").write_bytes(content)
    with pytest.raises(AmpError, match=r"1.index.npy: sha256 is .*; expected"):
        rewrite_knowledge(str(folder), str(knowledge), console=QUIET)
    records_of(folder / "0.tar").write_bytes(b"{}\n")
    with pytest.raises(
        AmpError, match=r"0.records.jsonl: sha256 is .*; expected .*or their index with amp index_shards"
    ):
        rewrite_knowledge(str(folder), str(knowledge), console=QUIET)
    assert index(str(folder)).captions("train") == 21


def test_ids_of_two_splits(tmp_path):
    """Each split is numbered from 0: a record needs its caption too, as amp generate_knowledge writes it."""
    for n in (0, 1):
        tar_of(tmp_path / f"{n}.tar", *clip_benchmark(0, PHOTOS[n], [f"A dog {n}"]))
        index(str(tmp_path / f"{n}.tar"), split=("train", "test")[n])
    records = [record for split in ("train", "test") for _, record in samples(tmp_path, split)]
    assert [record["captions"][0]["id"] for record in records] == [0, 0]
    knowledge = tmp_path / "knowledge.jsonl"
    lines = [
        {"sentid": 0, "caption": f"A dog {n}", "triplets": [{"subject": "dog", "action": f"runs{n}", "object": ""}]}
        for n in (0, 1)
    ]
    knowledge.write_text("".join(json.dumps({**line, "states": ["x"]}) + "\n" for line in lines))
    manifest = rewrite_knowledge(str(tmp_path), str(knowledge), console=QUIET)
    assert manifest.captions_without_knowledge == {"train": 0, "test": 0}
    for n, split in enumerate(("train", "test")):
        assert samples(tmp_path, split)[0][1]["captions"][0]["triplets"][0]["action"] == f"runs{n}"
    lines[0]["caption"] = "A cat"
    knowledge.write_text("".join(json.dumps({**line, "states": ["x"]}) + "\n" for line in lines))
    with pytest.raises(AmpError, match="'caption' is 'A cat'; expected 'A dog 0', which sentid 0 has"):
        rewrite_knowledge(str(tmp_path), str(knowledge), console=QUIET)
    knowledge.write_text(json.dumps({"sentid": 0, "triplets": [], "states": []}))
    with pytest.raises(
        AmpError, match=r"'sentid' is 0, which 2 captions have .splits train, test.; expected 'image' and"
    ):
        rewrite_knowledge(str(tmp_path), str(knowledge), console=QUIET)


@pytest.mark.system
def test_generated_knowledge_is_the_same_for_both(tars, tmp_path):
    _, folder = tars
    convert(folder, tmp_path / "converted")
    index(str(folder))
    written = []
    for n, root in enumerate((tmp_path / "converted", folder)):
        done = run_here("tools/generate_knowledge.py", "--captions", root, "--out", tmp_path / f"knowledge{n}")
        assert done.returncode == 0, done.stderr
        written.append((tmp_path / f"knowledge{n}" / "knowledge.jsonl").read_bytes())
        manifest = rewrite_knowledge(str(root), str(tmp_path / f"knowledge{n}"), console=QUIET)
        assert manifest.captions_without_knowledge == {"train": 0}
    assert written[0] == written[1] and samples(tmp_path / "converted") == samples(folder)


# Command lines


def test_command_lines(tars, tmp_path):
    dataset, folder = tars
    tars_named = f"{folder}/{{0..2}}.tar"
    done = run_here("tools/index_shards.py", "--shards", tars_named, "--split", "test", "--workers", "1")
    assert done.returncode == 0 and "manifest.json written" in done.stdout, done.stderr
    assert f"{tars_named}: captions read from .txt, one caption per line (11 samples)" in done.stderr
    assert json.loads((folder / "manifest.json").read_text())["provenance"]["command"][0] == "index_shards.py"
    options = (
        "--captions",
        tars_named,
        "--out",
        tmp_path / "out",
        "--workers",
        "1",
        "--knowledge",
        dataset["knowledge"],
    )
    done = run_here("tools/make_shards.py", *options)
    assert done.returncode == 0 and "manifest.json written" in done.stdout, done.stderr
    done = run_here("tools/make_shards.py", *options, "--caption_keys", "caption", "long")
    assert done.returncode == 2 and "no .json has the key 'caption' of --caption_keys" in done.stderr
    done = run_here("tools/index_shards.py", "--shards", tmp_path / "no" / "{0..3}.tar")
    assert done.returncode == 2 and "no/0.tar: can't be read" in done.stderr
