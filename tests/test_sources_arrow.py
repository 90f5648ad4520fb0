"""Captions from Parquet files and from Hugging Face's `datasets`, with the photos that they contain."""

import hashlib
import json
import os
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
from PIL import Image
from support.photos import encoded

from amp.data.captions.base import DATASET_PREFIX
from amp.data.captions.load import load_captions
from amp.data.conversion.make import make_shards
from amp.data.conversion.photos import write_photos
from amp.data.images.formats import suffix_of
from amp.data.shards import ShardManifest
from amp.errors import AmpError
from amp.terminal import PlainConsole

NEEDS = 'needs pyarrow and datasets: pip install "open-clip-amp[datasets]"'
pyarrow = pytest.importorskip("pyarrow", reason=NEEDS)
parquet = pytest.importorskip("pyarrow.parquet", reason=NEEDS)
datasets = pytest.importorskip("datasets", reason=NEEDS)

QUIET = PlainConsole(quiet=True)
SEEN = {"caption": ["A man", "A dog"]}


@pytest.fixture(autouse=True)
def own_cache_and_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def photo(number: int, format: str = "JPEG") -> bytes:
    return encoded(Image.new("RGB", (8, 8), (40 * number % 256, number % 256, 77)), format)


def named(content: bytes, suffix: str = ".jpg") -> str:
    return hashlib.sha256(content).hexdigest()[:32] + suffix


def write(folder, columns, name="captions.parquet", **options):
    path = folder / name
    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def dataset_of(rows, **features):
    """A dataset with the column `image` of the feature Image."""
    kinds = {"image": datasets.Image(), "caption": datasets.Value("string"), **features}
    return datasets.Dataset.from_list(rows, features=datasets.Features(kinds))


def image_folder(folder, **splits):
    """Hugging Face's image folder: file names and captions, by split."""
    for split, rows in splits.items():
        (folder / split).mkdir(parents=True)
        for number, (name, _) in enumerate(rows):
            (folder / split / name).write_bytes(photo(number + len(split)))
        lines = (json.dumps({"file_name": name, "text": text}) + "\n" for name, text in rows)
        (folder / split / "metadata.jsonl").write_text("".join(lines))
    return folder


def flat(source):
    return [(image.path, image.split, [caption.text for caption in image.captions]) for image in source.images]


def kinds(source):
    return [(skip.kind, skip.captions) for skip in source.skipped]


def contents(out):
    """Bytes of the photos in all shards -> their split and captions."""
    found = {}
    manifest = ShardManifest.load(out)
    for split in manifest.splits:
        for shard in manifest.split(split):
            with shard.open() as reader:
                for i in range(len(reader)):
                    image, record = reader.read(i)
                    found[image] = (split, [caption["text"] for caption in record["captions"]])
    return found


# Parquet


def test_parquet_with_paths(tmp_path):
    path = write(
        tmp_path,
        {
            "File Name": ["a.jpg", "s/b.jpg", "a.jpg", None, "c.jpg"],
            "text": ["A man", "A dog", " Two men ", "Lost", None],
            "split": ["train", "Validation", "train", "train", ""],
            "width": [1, 2, 3, 4, 5],
        },
    )
    source = load_captions(path)
    assert flat(source) == [("a.jpg", "train", ["A man", "Two men"]), ("s/b.jpg", "val", ["A dog"])]
    assert [caption.id for caption in source.images[0].captions] == [0, 2]
    assert kinds(source) == [("caption_without_image", 1), ("empty_caption", 1), ("image_without_caption", 0)]
    assert source.skipped[0].reason == f"{path} row 3: 'image' is empty"
    assert source.notes == [
        f"{path}: image from 'File Name', caption from 'text', columns not read: width",
        f"{path}: splits stored: 'Validation' as 'val'",
    ]
    assert (source.photos, source.folder) == (None, None)


def test_parquet_with_lists_of_captions_and_dictionary_columns(tmp_path):
    """pandas writes categories as dictionaries, which may also have the large types."""
    columns = {
        "image": pyarrow.array(["a.jpg", "b.jpg"]).dictionary_encode(),
        "captions": pyarrow.array([["A man", "", "A dog"], None], pyarrow.large_list(pyarrow.large_string())),
    }
    source = load_captions(write(tmp_path, columns))
    assert flat(source) == [("a.jpg", "train", ["A man", "A dog"])]
    assert [caption.id for caption in source.images[0].captions] == [0, 2]


def test_parquet_with_columns_in_any_order(tmp_path):
    """In Parquet, `image.width` is also how a part of `image` would be named."""
    columns = {"split": ["val", "test"], **SEEN, "image.width": [1, 2], "image": ["a.jpg", "b.jpg"]}
    source = load_captions(write(tmp_path, columns))
    assert flat(source) == [("a.jpg", "val", ["A man"]), ("b.jpg", "test", ["A dog"])]


def test_parquet_is_read_in_batches_over_row_groups(tmp_path):
    count = 1000
    columns = {"image": [f"{n}.jpg" for n in range(count)], "caption": [f"Number {n}" for n in range(count)]}
    source = load_captions(write(tmp_path, columns, row_group_size=300))
    assert flat(source) == [(f"{n}.jpg", "train", [f"Number {n}"]) for n in range(count)]


@pytest.mark.parametrize("as_struct", [True, False], ids=["struct", "binary"])
def test_parquet_with_photos(tmp_path, as_struct):
    """The same photo in several rows is one image, by its content."""
    first, second = photo(1), photo(2, "PNG")
    cells = [first, second, None, b"", first]
    if as_struct:
        cells = [None if cell is None else {"bytes": cell, "path": f"{i}.bin"} for i, cell in enumerate(cells)]
    columns = {"image": cells, "caption": ["A man", "A dog", "Lost", "Lost too", "Two men"]}
    source = load_captions(write(tmp_path, columns))
    assert flat(source) == [
        (named(first), "train", ["A man", "Two men"]),
        (named(second, ".png"), "train", ["A dog"]),
    ]
    assert [image.name for image in source.images] == (
        ["0.bin", "1.bin"] if as_struct else [image.path for image in source.images]
    )
    assert kinds(source) == [("caption_without_image", 1)] * 2
    assert list(source.photos()) == [(named(first), first), (named(second, ".png"), second), (named(first), first)]


def test_parquet_with_a_struct_that_has_only_a_path(tmp_path):
    cells = [{"bytes": None, "path": "s/a.jpg"}, {"bytes": photo(1), "path": None}]
    source = load_captions(write(tmp_path, {"image": cells, **SEEN}))
    assert [image.path for image in source.images] == ["s/a.jpg", named(photo(1))]


def test_the_only_column_of_photos_is_the_image_column(tmp_path):
    """WebDataset calls it "jpg"; another column may have a name that usually means the image."""
    struct = [{"bytes": photo(1), "path": None}] * 2
    source = load_captions(write(tmp_path, {"jpg": struct, "filename": ["a.jpg", "b.jpg"], **SEEN}))
    assert flat(source) == [(named(photo(1)), "train", ["A man", "A dog"])]
    assert source.notes[0].endswith("image from 'jpg', columns not read: filename")
    source = load_captions(write(tmp_path, {"thumbnail": struct, "image": ["a.jpg", "b.jpg"], **SEEN}))
    assert [image.path for image in source.images] == ["a.jpg", "b.jpg"] and source.photos is None


def test_a_photo_in_two_splits_is_kept_in_the_first(tmp_path):
    columns = {"image": [photo(1)] * 3, "caption": [["A", "B"], ["C", "D"], ["E"]], "split": ["test", "train", "test"]}
    path = write(tmp_path, columns)
    source = load_captions(path)
    assert flat(source) == [(named(photo(1)), "test", ["A", "B", "E"])]
    assert kinds(source) == [("duplicate_key", 2)] and source.skipped[0].split == "train"
    assert source.skipped[0].reason == f"{path} row 1: row 0 has the same photo in split 'test' and was kept"
    with pytest.raises(AmpError, match=r"row 1: 'split' is 'train', but row 0 puts the same image in 'test'"):
        load_captions(write(tmp_path, columns | {"image": ["a.jpg"] * 3}))


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"id": [1], "caption": ["A"]}, "column 'image' is missing; columns seen: 'id, caption'; expected 'image' or"),
        ({"image": ["a.jpg"]}, "column 'caption' is missing"),
        ({"image": ["a.jpg"], "text": ["A"], "title": ["A"]}, "columns 'text' and 'title' could each hold the caption"),
        ({"image": ["a.jpg"], "caption": [3]}, "row 0: 'caption' is 3; expected a string"),
        ({"image": ["a.jpg"], "caption": [[3]]}, r"row 0: 'caption'\[0\] is 3; expected a string"),
        ({"image": [[0, 255]], "caption": ["A"]}, r"row 0: 'image' is \[0, 255\]; expected a string"),
        ({"image": [{"url": "x"}], "caption": ["A"]}, r"row 0: 'image' is {'url': 'x'}; expected a string"),
        ({"image": ["../a.jpg"], "caption": ["A"]}, "row 0: image file '../a.jpg' is not allowed"),
        ({"image": ["a.jpg"], "caption": ['["A", "B"]']}, "row 0: the caption is .*, a list; expected text"),
        ({"image": pyarrow.array([], "string"), "caption": pyarrow.array([], "string")}, "no image with a caption"),
    ],
)
def test_parquet_malformed(tmp_path, columns, words):
    path = write(tmp_path, columns)
    with pytest.raises(AmpError, match=words) as error:
        load_captions(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_parquet_with_strings_that_are_not_utf_8(tmp_path):
    broken = pyarrow.array([b"A man", b"\xff"]).cast(pyarrow.string(), safe=False)
    with pytest.raises(AmpError, match=r"captions.parquet row 0 or one of the next 63: not UTF-8 \(invalid start"):
        load_captions(write(tmp_path, {"image": ["a.jpg", "b.jpg"], "caption": broken}))


def test_parquet_that_is_damaged_or_something_else(tmp_path):
    path = write(tmp_path, {"image": [photo(n) for n in range(200)], "caption": ["A man"] * 200})
    whole = path.read_bytes()
    middle = len(whole) // 2
    for content in (b"", b"image,caption\na.jpg,A man\n", whole[:middle], whole[:4] + bytes(middle) + whole[middle:]):
        path.write_bytes(content)
        with pytest.raises(
            AmpError, match=r"captions.parquet( row \d+)?: can't be read \(.*\); expected a com"
        ) as error:
            load_captions(path)
        assert "\n" not in str(error.value)
    with pytest.raises(AmpError, match=r"no.parquet: can't be read \(.*No such file"):
        load_captions(tmp_path / "no.parquet")


def test_parquet_with_another_suffix_is_named(tmp_path):
    path = write(tmp_path, {"image": ["a.jpg", "b.jpg"], **SEEN}, "captions.csv")
    with pytest.raises(AmpError, match=r"this is a Parquet file; name it .parquet, or give --format parquet"):
        load_captions(path)
    assert len(load_captions(path, "parquet").images) == 2


@pytest.mark.parametrize(("package", "captions"), [("pyarrow", "c.parquet"), ("datasets", "datasets:cats")])
def test_a_missing_package_names_its_extra(monkeypatch, package, captions):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(AmpError, match=rf'without the package {package} .*pip install "open-clip-amp\[datasets\]"'):
        load_captions(captions)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".gif", ".bmp", ".tif"])
def test_the_suffix_of_content(suffix):
    format = {".jpg": "JPEG", ".tif": "TIFF"}.get(suffix, suffix[1:].upper())
    assert suffix_of(photo(1, format)) == suffix
    assert suffix_of(b"no image") == suffix_of(b"") == suffix_of(b"RIFF\0\0\0\0WAVE") == ""
    assert suffix_of(b"\0\0\0\x1cftypavif\0\0\0\0") == ".avif"


# datasets


def test_an_image_folder_is_used_where_it_is(tmp_path):
    """Also as the current folder; the splits are those of the dataset."""
    folder = image_folder(
        tmp_path / "photos", train=[("a.jpg", "A man"), ("b.jpg", "A dog")], validation=[("a.jpg", "A cat")]
    )
    source = load_captions(f"{DATASET_PREFIX}{folder}")
    assert flat(source) == [
        (f"{folder}/train/a.jpg", "train", ["A man"]),
        (f"{folder}/train/b.jpg", "train", ["A dog"]),
        (f"{folder}/validation/a.jpg", "val", ["A cat"]),
    ]
    assert (source.folder, source.photos) == (folder, None)
    assert source.notes[0] == f"datasets:{folder}: caption from 'text'" and len(source.notes) == 2
    manifest = make_shards(f"datasets:{folder}", None, str(tmp_path / "out"), workers=1, console=QUIET)
    assert contents(tmp_path / "out") == {
        (folder / "train/a.jpg").read_bytes(): ("train", ["A man"]),
        (folder / "train/b.jpg").read_bytes(): ("train", ["A dog"]),
        (folder / "validation/a.jpg").read_bytes(): ("val", ["A cat"]),
    }
    assert not (tmp_path / "out/photos").exists()
    assert manifest.provenance["captions"] == {"file": f"datasets:{folder}", "sha256": source.sha256}


@pytest.mark.parametrize("how", ["parquet", "disk", "disk without splits"])
def test_a_dataset_with_its_photos(tmp_path, how):
    """The bytes of a photo are those of the file, never decoded: a PNG whose pixels would not survive is kept."""
    folder, broken = tmp_path / "cats", photo(3, "PNG")[:-9] + b"123456789"
    rows = [
        {"image": {"bytes": photo(1), "path": "one.jpg"}, "caption": ["A man", "Two men"]},
        {"image": {"bytes": broken, "path": None}, "caption": ["A dog"]},
        {"image": None, "caption": ["Lost", "Lost too"]},
        {"image": {"bytes": photo(2), "path": None}, "caption": None},
    ]
    whole = dataset_of(rows, caption=datasets.Sequence(datasets.Value("string")))
    if how == "parquet":
        folder.mkdir()
        whole.to_parquet(folder / "validation.parquet")
    elif how == "disk":
        datasets.DatasetDict(validation=whole).save_to_disk(folder)
    else:
        whole.save_to_disk(folder)
    split = "val" if how != "disk without splits" else "fold"
    source = load_captions(f"datasets:{folder}", default_split="fold")
    assert flat(source) == [
        (named(photo(1)), split, ["A man", "Two men"]),
        (named(broken, ".png"), split, ["A dog"]),
    ]
    assert kinds(source)[0] == ("caption_without_image", 2) and kinds(source)[-1] == ("image_without_caption", 0)
    place = "row 2" if split == "fold" else "validation row 2"
    assert source.skipped[0].reason == f"datasets:{folder} {place}: 'image' is empty"
    assert [image.name for image in source.images] == ["one.jpg", named(broken, ".png")]
    assert dict(source.photos()) == {
        named(c, s): c for c, s in ((photo(1), ".jpg"), (broken, ".png"), (photo(2), ".jpg"))
    }


def test_a_column_of_splits_goes_before_the_splits_of_the_dataset(tmp_path):
    """Flickr30k on the hub is one split "test", with a column of Karpathy's splits."""
    rows = [
        {"image": {"bytes": photo(n), "path": None}, "caption": f"{n}", "split": s} for n, s in enumerate(["val", None])
    ]
    datasets.DatasetDict(test=dataset_of(rows, split=datasets.Value("string"))).save_to_disk(tmp_path / "d")
    assert [image.split for image in load_captions(f"datasets:{tmp_path}/d").images] == ["val", "test"]


def test_a_configuration_of_a_dataset(tmp_path, monkeypatch):
    folder = tmp_path / "cats"
    for number, config in enumerate(("small", "large")):
        (folder / config).mkdir(parents=True)
        write(folder / config, {"image": [f"{config}.jpg"], "caption": [f"{number}"]}, "train.parquet")
    configs = [{"config_name": c, "data_files": f"{c}/*.parquet"} for c in ("small", "large")]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    monkeypatch.chdir(tmp_path)
    with_config = {name: load_captions(f"datasets:cats:{name}") for name in ("small", "large")}
    assert {name: source.images[0].path for name, source in with_config.items()} == {
        "small": "small.jpg",
        "large": "large.jpg",
    }
    assert with_config["small"].sha256 != with_config["large"].sha256
    with pytest.raises(AmpError, match=r"datasets:cats: can't be opened \(ValueError: Config name is missing. .*small"):
        load_captions("datasets:cats")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("datasets:", r"datasets:: not the name of a dataset; expected datasets:NAME or datasets:NAME:CONFIG"),
        (
            "datasets:nobody/nothing",
            r"datasets:nobody/nothing: can't be opened \(.*nothing.*; check the name and the ne",
        ),
        ("datasets:{empty}", r"empty: can't be opened \(.*; expected a folder, or NAME"),
    ],
)
def test_datasets_that_cannot_be_opened(tmp_path, name, words):
    (tmp_path / "empty").mkdir()
    with pytest.raises(AmpError, match=words) as error:
        load_captions(name.format(empty=tmp_path / "empty"))
    assert "\n" not in str(error.value)


def test_the_format_of_datasets_needs_its_prefix(tmp_path):
    with pytest.raises(AmpError, match="cats: not the name of a dataset; expected datasets:NAME"):
        load_captions("cats", "datasets")


def hub_dataset(monkeypatch, *files):
    """A dataset of the hub whose photos are these files."""
    rows = [{"image": {"bytes": None, "path": str(file)}, "caption": file.name} for file in files]
    dataset = datasets.DatasetDict(train=dataset_of(rows))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: {("org/cats", None): dataset}[name, config])


def test_photos_of_the_hub_are_used_in_its_cache(tmp_path, monkeypatch):
    files = [tmp_path / "cache/downloads/extracted/x" / name for name in ("a/1.jpg", "b/2.jpg")]
    for number, file in enumerate(files):
        file.parent.mkdir(parents=True)
        file.write_bytes(photo(number))
    hub_dataset(monkeypatch, *files)
    make_shards("datasets:org/cats", None, str(tmp_path / "out"), workers=1, console=QUIET)
    assert contents(tmp_path / "out") == {photo(0): ("train", ["1.jpg"]), photo(1): ("train", ["2.jpg"])}


def test_a_dataset_of_the_hub_cannot_name_other_files_of_this_machine(tmp_path, monkeypatch):
    (tmp_path / "private.jpg").write_bytes(photo(1))
    hub_dataset(monkeypatch, tmp_path / "private.jpg")
    with pytest.raises(
        AmpError, match=r"datasets:org/cats: contains the names of photos, not the photos.*add --images"
    ):
        make_shards("datasets:org/cats", None, str(tmp_path / "out"), workers=1, console=QUIET)


# Conversion of photos that the captions contain


def with_photos(folder, count=6):
    columns = {"image": [photo(n) for n in range(count)], "caption": [f"Number {n}" for n in range(count)]}
    return write(folder, columns | {"split": ["train", "test"] * (count // 2)})


def convert(path, out, images=None, **options):
    return make_shards(str(path), images and str(images), str(out), workers=1, console=QUIET, **options)


def test_photos_are_extracted_and_converted(tmp_path):
    path, out = with_photos(tmp_path), tmp_path / "out"
    convert(path, out)
    assert contents(out) == {photo(n): (("train", "test")[n % 2], [f"Number {n}"]) for n in range(6)}
    assert {file.name: file.read_bytes() for file in (out / "photos").iterdir()} == {
        named(photo(n)): photo(n) for n in range(6)
    }
    tars = {tar.name: tar.stat().st_mtime_ns for tar in out.glob("*.tar")}
    for file in list((out / "photos").iterdir())[1:]:
        file.unlink()
    convert(path, out)  # extracts the photos again, and keeps the shards
    assert tars == {tar.name: tar.stat().st_mtime_ns for tar in out.glob("*.tar")}
    assert len(list((out / "photos").iterdir())) == 6


def test_photos_that_exist_are_not_written_again(tmp_path, monkeypatch):
    path, images = with_photos(tmp_path), tmp_path / "images"
    images.mkdir()
    convert(path, tmp_path / "out", images)
    before = {file.name: file.stat().st_ino for file in images.iterdir()}
    next(images.iterdir()).unlink()
    convert(path, tmp_path / "other", images)
    kept = {file.name for file in images.iterdir() if before[file.name] == file.stat().st_ino}
    assert len(kept) >= 5 and before.keys() == {file.name for file in images.iterdir()}
    source = load_captions(path)
    source.photos = lambda: pytest.fail("all photos exist")
    write_photos(source, source.images, images, QUIET)
    assert not (tmp_path / "out/photos").exists() and not (tmp_path / "other/photos").exists()


def test_only_the_photos_of_the_chosen_images_are_extracted(tmp_path):
    convert(with_photos(tmp_path), tmp_path / "out", splits=["test"], limit=2)
    assert len(contents(tmp_path / "out")) == len(list((tmp_path / "out/photos").iterdir())) == 2


def test_parts_extract_the_photos_too(tmp_path):
    path = with_photos(tmp_path)
    for part in ("1/2", "0/2", None):
        convert(path, tmp_path / "out", samples_per_shard=2, part=part)
    convert(path, tmp_path / "plain", samples_per_shard=2)
    for tar in (tmp_path / "plain").glob("*.tar"):
        assert (tmp_path / "out" / tar.name).read_bytes() == tar.read_bytes()


def test_an_extraction_that_stops_leaves_whole_files(tmp_path, monkeypatch):
    source = load_captions(with_photos(tmp_path))
    photos, folder = list(source.photos()), tmp_path / "photos"

    def stop(*arguments):
        raise KeyboardInterrupt

    source.photos = lambda: (photo if number < 2 else stop() for number, photo in enumerate(photos))
    with pytest.raises(KeyboardInterrupt):
        write_photos(source, source.images, folder, QUIET)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == dict(photos[:2])
    source.photos = lambda: iter(photos)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "utime", stop)  # after the content is written
        write_photos(source, source.images, folder, QUIET)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == dict(photos[:2])
    (tmp_path / "file").write_text("")
    with pytest.raises(AmpError, match=r"file/.*\.jpg: can't be written \(.*--images"):
        write_photos(source, source.images, tmp_path / "file", QUIET)


def test_content_that_is_no_photo_is_skipped_with_the_reason(tmp_path):
    columns = {"image": [photo(1), b"<html>", b"\0\0\0\x0cjP  ..."], "caption": ["A", "B", "C"]}
    manifest = convert(write(tmp_path, columns), tmp_path / "out", max_skipped=0.7)
    reasons = sorted(entry["reason"] for entry in manifest.skipped["unreadable_image"])
    assert reasons[0].startswith("6 bytes, not an image in one of the formats") and "JPEG 2000 is not" in reasons[1]


def test_images_can_be_left_out_only_with_photos(tmp_path):
    path = write(tmp_path, {"image": ["a.jpg", "b.jpg"], **SEEN})
    with pytest.raises(AmpError, match=r"captions.parquet: contains the names of photos, not.*add --images"):
        convert(path, tmp_path / "out")


def test_the_command_needs_no_images(tmp_path, capsys):
    from amp.commands.make_shards import main

    main(["--captions", str(with_photos(tmp_path)), "--out", str(tmp_path / "out"), "--workers", "1"])
    assert len(contents(tmp_path / "out")) == 6
    assert f"extracting photos to {tmp_path}/out/photos: 6 of 6 images" in capsys.readouterr().err


def test_knowledge_of_a_dataset(tmp_path):
    """By number, and by the photo's original name."""
    rows = [{"image": {"bytes": photo(n), "path": f"{n}.jpg"}, "caption": f"Number {n}"} for n in range(3)]
    dataset_of(rows).save_to_disk(tmp_path / "d")
    know = {"triplets": [{"subject": "man", "action": "runs", "object": ""}], "states": ["Legs apart"]}
    records = [{"sentid": 2, **know}, {"image": "1.jpg", "caption": "Number 1", **know}]
    (tmp_path / "k.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    manifest = convert(f"datasets:{tmp_path}/d", tmp_path / "out", knowledge=str(tmp_path / "k.jsonl"))
    assert manifest.captions_without_knowledge == {"train": 1}


def test_knowledge_is_generated_from_a_dataset(tmp_path):
    pytest.importorskip("spacy", reason='needs spaCy: pip install "open-clip-amp[generate]"')
    from amp.generation.run import generate_knowledge

    dataset_of([{"image": {"bytes": photo(1), "path": None}, "caption": "A dog runs"}]).save_to_disk(tmp_path / "d")
    name = f"datasets:{tmp_path}/d"
    generate_knowledge(name, str(tmp_path / "k"), console=QUIET)
    provenance = json.loads((tmp_path / "k/knowledge_provenance.json").read_text())
    assert provenance["captions_sha256"] == load_captions(name).sha256
    manifest = convert(name, tmp_path / "out", knowledge=str(tmp_path / "k"))
    assert manifest.captions_without_knowledge == {"train": 0}
    assert Path(manifest.provenance["captions"]["file"]).name == "d"
