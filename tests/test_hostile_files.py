"""Malicious tar members and image files: refused, or skipped and listed, never followed."""

import json
import os
import pickle
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.commands import Canary, one_error, training_arguments
from support.drawn_data import captions_of
from support.photos import bad_images, odd_images, png
from support.repository import launcher
from support.tars import members_of, replace_shard

import amp
from amp.data.conversion.make import make_shards
from amp.data.images.file import Resize, is_whole, open_photo, read_image
from amp.data.images.formats import UnreadableImageError
from amp.data.shards import MAX_MEMBER_BYTES, ShardManifest, ShardReader
from amp.data.split import ShardSplit
from amp.errors import AmpError
from amp.search.index import PhotoIndex
from amp.search.update import update_index

GOOD = {"a.jpg": b"J" * 700, "a.json": json.dumps({"schema": 1, "key": "a", "captions": [{"text": "x"}]}).encode()}


# -- tar members ------------------------------------------------------------------------------------------------------


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, **changes) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    for key, value in changes.items():
        setattr(member, key, value)
    return member.tobuf(tarfile.GNU_FORMAT)


def member(name: str, content: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    return header(name, len(content), kind) + content + bytes(-len(content) % 512)


def pax(**values: str) -> bytes:
    lines = b""
    for key, value in values.items():
        line = f" {key.replace('__', '.')}={value}\n".encode()
        size = len(line) + 1
        while len(str(size)) + len(line) != size:
            size += 1
        lines += str(size).encode() + line
    return member("pax", lines, tarfile.XHDTYPE)


def with_size(raw: bytes, field: bytes) -> bytes:
    """A header with another size field and a correct checksum."""
    raw = raw[:124] + field.rjust(12, b"\0") + raw[136:]
    total = sum(raw[:148]) + 8 * 32 + sum(raw[156:512])
    return raw[:148] + b"%06o\0 " % total + raw[156:]


RECORD = member("b.json", GOOD["a.json"].replace(b'"a"', b'"b"'))  # complete samples except for their image
WHOLE = b"".join(member(name, content) for name, content in GOOD.items())
NEGATIVE = b"\xff" * 10 + b"\xfc\x00"  # base 256, -1024
TARS = {
    "a negative size": with_size(header("b.jpg"), NEGATIVE) + WHOLE,
    "a negative size in front of itself": WHOLE + with_size(header("b.jpg"), b"\xff" * 10 + b"\xfa\x00"),
    "a pax header of negative size": with_size(header("p", kind=tarfile.XHDTYPE), NEGATIVE) + WHOLE,
    "a long name of negative size": with_size(header("l", kind=tarfile.GNUTYPE_LONGNAME), NEGATIVE) + WHOLE,
    "a long name of 8 EB": with_size(header("l", kind=tarfile.GNUTYPE_LONGNAME), b"\x80" + b"\x7f" * 8) + WHOLE,
    "a size of 8 EB": with_size(header("b.jpg"), b"\x80" + b"\x7f" * 8) + WHOLE,
    "a size beyond the end": header("b.jpg", 10**6) + WHOLE,
    "a chain of pax headers": pax(comment="x") * 3000 + WHOLE,
    "a chain of long names": member("l", b"b.jpg\0", tarfile.GNUTYPE_LONGNAME) * 3000 + WHOLE,
    "a pax size below zero": pax(size="-512") + WHOLE,
    "a pax size of 8 EB": pax(size=str(2**63 - 1)) + WHOLE,
    "a pax path upwards": pax(path="../../b.jpg") + WHOLE,
    "a pax path from the root": pax(path="/etc/b.jpg") + WHOLE,
    "a sparse file": member("b.jpg", b"x" * 512, tarfile.GNUTYPE_SPARSE) + WHOLE,
    "a sparse map that goes on for ever": header("b.jpg", 0, tarfile.GNUTYPE_SPARSE)[:482] + b"\x01" * 30 + WHOLE,
    "a pax sparse map": pax(GNU__sparse__major="1", GNU__sparse__minor="0", GNU__sparse__realsize="9" * 30)
    + member("b.jpg", b"99999999\n" * 60)
    + WHOLE,
    "pax sparse numbers": pax(GNU__sparse__map="0,x,-1", GNU__sparse__numblocks="7") + WHOLE,
    "a kind nobody knows": member("b.jpg", b"x", b"Z") + WHOLE,
    "a block device": header("b.jpg", kind=tarfile.BLKTYPE, devmajor=8) + RECORD + WHOLE,
    "a pipe": header("b.jpg", kind=tarfile.FIFOTYPE) + RECORD + WHOLE,
    "a hard link to a member": WHOLE + header("b.jpg", kind=tarfile.LNKTYPE, linkname="a.jpg") + RECORD,
    "a link": header("b.jpg", kind=tarfile.SYMTYPE, linkname="/etc/passwd") + RECORD + WHOLE,
    "a record that is a link": member("b.jpg", b"J")
    + header("b.json", kind=tarfile.SYMTYPE, linkname="a.json")
    + WHOLE,
    "a name that is no text": header("b.jpg").replace(b"b.jpg", b"\xff\xfe.j"[:5]) + WHOLE,
}


@pytest.mark.parametrize("name", TARS)
@pytest.mark.timeout(60)
def test_a_tar_is_refused(tmp_path, name):
    path = tmp_path / "x.tar"
    path.write_bytes(TARS[name] + bytes(1024))
    with pytest.raises(AmpError, match=r"x\.tar") as error:
        ShardReader(path)
    assert len(str(error.value)) < 600


def test_a_whole_tar_is_read(tmp_path):
    """Otherwise the tars above could be refused for another reason."""
    (tmp_path / "x.tar").write_bytes(WHOLE + bytes(1024))
    assert ShardReader(tmp_path / "x.tar").read(0)[0] == GOOD["a.jpg"]


def test_a_member_of_gigabytes_is_refused_before_it_is_read(tmp_path):
    """The file really has this length, but is sparse and takes no disk space."""
    path = tmp_path / "x.tar"
    with open(path, "wb") as file:
        file.write(header("b.jpg", 2**36))
        file.truncate(2**36 + 4096)
    with pytest.raises(AmpError, match=rf"has 68719476736 bytes; expected at most {MAX_MEMBER_BYTES}"):
        ShardReader(path)


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    raw = bytearray(header("bb.jpg"))
    raw[:2] = b"\xff\xfe"
    (tmp_path / "x.tar").write_bytes(with_size(bytes(raw), b"00000000000\0") + WHOLE + bytes(1024))
    with pytest.raises(AmpError, match="name that is not UTF-8"):
        ShardReader(tmp_path / "x.tar")


def test_pickles_are_never_loaded(tmp_path):
    """Neither as a separate member nor as the content of an image or a record."""
    evil = pickle.dumps(Canary(tmp_path / "canary"))
    path = tmp_path / "x.tar"
    for name in ("b.pyd", "b.pkl", "b.pickle", "b.pt", "b.npy", "b.ten"):
        path.write_bytes(member(name, evil) + WHOLE + bytes(1024))
        with pytest.raises(AmpError, match="pickles are never read"):
            ShardReader(path)
    path.write_bytes(member("a.jpg", evil) + member("a.json", evil) + bytes(1024))
    reader = ShardReader(path)
    with pytest.raises(AmpError, match=r"a\.json: not JSON"):
        reader.record(0)
    with pytest.raises(OSError, match="bytes, not an image in one of the formats JPEG"):
        open_photo_of(reader.photo(0), tmp_path)
    assert not (tmp_path / "canary").exists()


def open_photo_of(content: bytes, folder: Path) -> Image.Image:
    (folder / "photo.jpg").write_bytes(content)
    return open_photo(folder / "photo.jpg")


# -- images, in conversion, index and search --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with bad and odd images, a pipe, a device, a sparse file of 1 GB, and broken and circular links."""
    root = tmp_path_factory.mktemp("hostile") / "photos"
    root.mkdir()
    for name, content in {**bad_images(), **odd_images()}.items():
        (root / name).write_bytes(content)
    os.mkfifo(root / "pipe.jpg")
    (root / "device.jpg").symlink_to("/dev/zero")
    (root / "circle.jpg").symlink_to("circle.jpg")
    (root / "nowhere.png").symlink_to("/nowhere/at/all.png")
    (root / "above").symlink_to(root)
    with open(root / "hole.tif", "wb") as file:
        file.truncate(2**30)
    return root


SPECIAL = ("pipe.jpg", "device.jpg", "circle.jpg", "nowhere.png", "hole.tif")


@pytest.mark.parametrize("check", ["structure", "decode"])
def test_conversion_skips_and_counts_them(photos, tmp_path, check):
    names = [*bad_images(), *odd_images(), *SPECIAL]
    main = launcher("tools/make_shards.py").main
    main(
        [
            "--captions",
            str(captions_of(tmp_path, names)),
            "--images",
            str(photos),
            "--out",
            str(tmp_path / "out"),
            "--max_skipped",
            "1",
            "--workers",
            "1",
            "--check",
            check,
        ]
    )
    manifest = ShardManifest.load(tmp_path / "out")
    skipped = {kind: {entry["file"]: entry["reason"] for entry in found} for kind, found in manifest.skipped.items()}
    assert set(skipped["unreadable_image"]) == {*bad_images(), "hole.tif"}
    assert set(skipped["missing_image"]) == set(SPECIAL) - {"hole.tif"}
    assert manifest.samples("train") == len(odd_images())
    assert "bytes, expected at most" in skipped["unreadable_image"]["hole.tif"]
    assert all(
        "bomb" in reason or "damaged" in reason or "not an image" in reason
        for name, reason in skipped["unreadable_image"].items()
        if "bomb" in name
    )
    split = ShardSplit(tmp_path / "out", "train")
    assert {split.image(i).getpixel((20, 20))[0] > 200 for i in range(len(split))} == {True}  # the first frame, red


@pytest.fixture(scope="module")
def model(clip_folder):
    """A model and its transform."""
    model, _, preprocess = amp.create_model_and_transforms(clip_folder)
    return model, preprocess


def test_the_search_index_skips_and_lists_them(photos, tmp_path, model):
    update = update_index(tmp_path / "index", photos, amp.Reranker(*model), workers=0)
    assert set(update.skipped) == {*bad_images(), *SPECIAL, "above"}  # a link to the parent folder
    assert set(PhotoIndex(tmp_path / "index").names) == set(odd_images())
    again = update_index(tmp_path / "index", photos, amp.Reranker(*model), workers=0)
    assert again.encoded == 0 and set(again.skipped) == set(update.skipped)


def test_a_name_that_is_no_text_is_listed(tmp_path, model):
    root = tmp_path / "photos"
    root.mkdir()
    whole = odd_images()["animated.gif"]
    (root / "a.gif").write_bytes(whole)
    Path(os.fsdecode(os.fsencode(root) + b"/\xff.gif")).write_bytes(whole)
    update = update_index(tmp_path / "index", root, amp.Reranker(*model), workers=0)
    assert update.skipped == {"\\udcff.gif": "its name is not valid UTF-8"}


def test_a_photo_that_became_a_bomb_is_told_by_a_search(tmp_path, model):
    """Between its two size limits Pillow only warns; this must be an error too."""
    root = tmp_path / "photos"
    root.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 30)).save(root / name)
    search = amp.Retriever(amp.Reranker(*model), tmp_path / "index")
    search.update(root, workers=0)
    (root / "a.png").write_bytes(bad_images()["png a bit too large.png"])
    found = search.search("a dog")
    assert [path.name for path in found.skipped] == ["a.png"] and len(found.hits) == 1


def rewrite(folder: Path, split: str, change) -> Path:
    """Passes the members of a split's first shard through `change` and updates size and hash in the manifest."""
    return replace_shard(folder, split, change(members_of(ShardManifest.load(folder).split(split)[0].path)))


def test_a_shard_with_them_is_refused_with_file_and_key(copied_shards):
    for name, content in bad_images().items():
        path = rewrite(copied_shards, "train", lambda members, new=content: [(members[0][0], new), *members[1:]])
        split = ShardSplit(copied_shards, "train")
        with pytest.raises(AmpError, match="can't be decoded") as error:
            split.image(0)
        assert "too large" not in name or "decompression bomb" in str(error.value)
        assert str(path) in str(error.value) and "train_" in str(error.value)
        assert split.image(1).mode == "RGB"


@pytest.mark.parametrize("launched", ["train", "evaluate"])
@pytest.mark.usefixtures("fresh_accelerate")
def test_training_and_evaluation_end_in_one_error(copied_shards, tmp_path, clip_folder, capsys, launched):
    split = {"train": "train", "evaluate": "test"}[launched]
    bomb = bad_images()["png a bit too large.png"]
    path = rewrite(copied_shards, split, lambda members: [(members[0][0], bomb), *members[1:]])
    changes = {"stage1__max_steps": 0, "stage1__epochs": 3}
    arguments = training_arguments(copied_shards, clip_folder, tmp_path, **changes)
    if launched == "evaluate":
        base = ["--model.name", clip_folder, "--model.pretrained", "null", "--cache", str(tmp_path / "cache")]
        arguments = ["--shards", str(copied_shards), *base, "--workers", "0", "--out", str(tmp_path / "results.json")]
    line = one_error(lambda: launcher(f"amp/commands/{launched}.py").main(arguments), capsys)
    assert str(path) in line and f"'{split}_" in line and "decompression bomb" in line


def test_a_png_without_pixels_is_skipped(tmp_path):
    """Found by the fuzz test: Pillow's check raises an IndexError."""
    content = png(9, 9)
    start, stop = content.index(b"IDAT") - 4, content.index(b"IEND") - 4
    (tmp_path / "a.png").write_bytes(content[:start] + content[stop:])
    with pytest.raises(OSError, match="IndexError"):
        is_whole((tmp_path / "a.png").read_bytes())
    for check in ("structure", "decode"):
        with pytest.raises(UnreadableImageError, match="damaged"):
            read_image(tmp_path / "a.png", None, check)


# -- conversion -------------------------------------------------------------------------------------------------------


def test_an_image_too_narrow_to_be_resized_is_skipped(tmp_path):
    """libjpeg writes at most 65,500 pixels per side. The error was taken for a full disk and ended the conversion."""
    Image.new("L", (70_000, 20)).save(tmp_path / "narrow.png")
    with pytest.raises(UnreadableImageError, match="pixels after resizing, expected at most 65500"):
        read_image(tmp_path / "narrow.png", Resize(19))


def test_a_file_named_like_a_key_of_another_gets_its_own(tmp_path):
    """Two files with the same stem get a hash suffix each; a third may already have this name."""
    import hashlib

    digest = hashlib.sha256(b"x/a.png").hexdigest()[:8]
    names = ["x/a.png", "y/a.png", f"a-{digest}.png"]
    for name in names:
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "images" / name)
    make_shards(str(captions_of(tmp_path, names)), str(tmp_path / "images"), str(tmp_path / "out"), workers=1)
    split = ShardSplit(tmp_path / "out", "train")
    assert {record["filename"] for record in split.records()} == set(names)
    assert len({record["key"] for record in split.records()}) == 3


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside.png", "a/../../outside.png"])
def test_a_choice_names_no_photo_outside_the_folder(tmp_path, name):
    from amp.evaluate.choice_files import load_choices

    path = tmp_path / "swap.json"
    path.write_text(json.dumps({"0": {"filename": name, "caption": "a", "negative_caption": "b"}}))
    found, skipped = load_choices(path)
    assert not found and "expected a path inside the images folder" in skipped["entry 0"]


def test_weights_under_another_name_are_no_weights(tmp_path, clip_folder, capsys, shards, fresh_accelerate):
    """A pickle in place of base model, features, scores, moments or adapter is refused and never loaded."""
    import shutil

    import numpy as np

    from amp.data.frozen_features import FrozenFeatures
    from amp.data.text_features import TextFeatureStore
    from amp.evaluate.per_query import load_queries
    from amp.model.adapter import read_adapter
    from amp.retrieval.score_store import ScoreStore
    from amp.train.checkpoints import Checkpoint

    canary = tmp_path / "canary"
    evil = pickle.dumps(Canary(canary))
    torch.save(Canary(canary), tmp_path / "zip.pt")
    objects = np.array([Canary(canary)], dtype=object)
    np.save(tmp_path / "objects.npy", objects)
    np.savez(tmp_path / "objects.npz", names=objects, pairs=objects, scores=objects, seconds=objects)
    for name, content in (("raw", evil), ("torch", (tmp_path / "zip.pt").read_bytes())):
        (tmp_path / f"{name}.safetensors").write_bytes(content)
        with pytest.raises(AmpError, match="safetensors"):
            read_adapter(tmp_path / f"{name}.safetensors")
    (tmp_path / "optimizer.safetensors").write_bytes(evil)
    with pytest.raises(AmpError, match=r"optimizer\.safetensors: not a complete safetensors file"):
        Checkpoint(tmp_path, {}).moments()
    with pytest.raises(AmpError, match="not per-query results"):
        load_queries(tmp_path / "objects.npz")
    (tmp_path / "scores").mkdir()
    shutil.copy(tmp_path / "objects.npz", tmp_path / "scores" / "scores-x.npz")
    assert not ScoreStore(tmp_path / "scores", 4).done.any()
    (tmp_path / "early").mkdir()
    for name in ("early", "base"):
        shutil.copy(tmp_path / "objects.npy", tmp_path / "early" / f"{name}.npy")
    with pytest.raises(AmpError, match="can't be read"):
        np.asarray(FrozenFeatures.load([tmp_path / "early"], [2]).base)
    segment = tmp_path / "text-0123456789abcdef-float32" / "segment-0"
    segment.mkdir(parents=True)
    for name in ("keys", "features"):
        shutil.copy(tmp_path / "objects.npy", segment / f"{name}.npy")
    with pytest.raises(AmpError, match="can't be read"):
        TextFeatureStore(tmp_path, "0123456789abcdef", 4)
    base = Path(shutil.copytree(clip_folder.removeprefix("local-dir:"), tmp_path / "base"))
    (base / "open_clip_model.safetensors").unlink()
    shutil.copy(tmp_path / "zip.pt", base / "open_clip_pytorch_model.bin")
    arguments = training_arguments(shards, f"local-dir:{base}", tmp_path)
    assert "can't load it" in one_error(lambda: launcher("launchers/train.py").main(arguments), capsys)
    assert not canary.exists()
