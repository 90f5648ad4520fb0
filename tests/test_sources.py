"""Captions and knowledge files: every format reads to the same, and a malformed line is named."""

import csv
import json
from pathlib import Path

import pytest

from amp.data.sources import (
    SKIP_KINDS,
    CaptionedImage,
    SourceFormatError,
    attach_knowledge,
    load_captions,
    load_image_list,
)
from amp.errors import AmpError

FLICKR8K = Path(__file__).parents[2] / "shared" / "data" / "flickr8k"


def karpathy_image(number=0, split="train", captions=("A man runs",), **changes):
    sentences = [{"raw": text, "sentid": 10 * number + j, "tokens": []} for j, text in enumerate(captions)]
    return {"filename": f"{number}.jpg", "imgid": number, "split": split, "sentences": sentences, **changes}


def write_karpathy(folder, *images, **top):
    path = folder / "dataset.json"
    path.write_text(json.dumps({"images": list(images), **top}))
    return path


def write_jsonl(folder, rows, name="captions.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def flat(images):
    return [(image.path, image.split, [caption.text for caption in image.captions]) for image in images]


def kinds(source):
    return [skip.kind for skip in source.skipped]


# Karpathy JSON


def test_karpathy_with_folders_and_restval(tmp_path):
    path = write_karpathy(
        tmp_path,
        karpathy_image(1, "train", ("one", "two"), filepath="train2014", cocoid=391895),
        karpathy_image(2, "restval", filepath="val2014", cocoid=7),
        karpathy_image(3, "test", filepath="val2014/", cocoid=8),
    )
    source = load_captions(path)
    assert flat(source.images) == [
        ("train2014/1.jpg", "train", ["one", "two"]),
        ("val2014/2.jpg", "train", ["A man runs"]),
        ("val2014/3.jpg", "test", ["A man runs"]),
    ]
    assert [image.id for image in source.images] == [391895, 7, 8]
    assert source.images[0].name == "1.jpg"
    assert [caption.id for caption in source.images[0].captions] == [10, 11]
    assert source.skipped == []
    assert [image.split for image in load_captions(path, keep_restval=True).images] == ["train", "restval", "test"]


def test_karpathy_image_id_falls_back_to_imgid_and_then_to_the_path(tmp_path):
    second = karpathy_image(2)
    del second["imgid"]
    images = load_captions(write_karpathy(tmp_path, karpathy_image(1), second)).images
    assert [image.id for image in images] == [1, "2.jpg"]


def test_karpathy_sentids_are_counted_where_absent(tmp_path):
    images = [karpathy_image(n, captions=("a", "b")) for n in range(2)]
    for image in images:
        for sentence in image["sentences"]:
            del sentence["sentid"]
    source = load_captions(write_karpathy(tmp_path, *images))
    assert [caption.id for image in source.images for caption in image.captions] == [0, 1, 2, 3]


def test_karpathy_gaps_are_counted_and_left_out(tmp_path):
    source = load_captions(
        write_karpathy(
            tmp_path,
            karpathy_image(1, captions=("kept", "  ")),
            karpathy_image(2, captions=()),
            karpathy_image(3, captions=("",)),
            karpathy_image(4, filename=" "),
            karpathy_image(5, "test", filename="1.jpg", captions=("x", "y")),
        )
    )
    assert flat(source.images) == [("1.jpg", "train", ["kept"])]
    assert kinds(source) == [
        "empty_caption",
        "empty_caption",
        "caption_without_image",
        "duplicate_key",
        "image_without_caption",
        "image_without_caption",
    ]
    assert set(kinds(source)) <= set(SKIP_KINDS)
    duplicate = source.skipped[3]
    assert (duplicate.file, duplicate.split, duplicate.captions) == ("1.jpg", "test", 2)
    assert "images[0] (split train)" in duplicate.reason


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], "expected a JSON object"),
        ({"image": []}, "key 'images' is missing; keys seen: 'image'"),
        ({"images": {}}, "'images' is {}; expected a list"),
        ({"images": [], "annotations": []}, "COCO's own annotation file"),
        ({"images": ["a.jpg"]}, r"images\[0\]: 'a.jpg'; expected a JSON object"),
        ({"images": [{"file_name": "a.jpg"}]}, r"images\[0\]: key 'filename' is missing; keys seen: 'file_name'"),
        ({"images": [karpathy_image(filename=None)]}, "'filename' is None; expected a string"),
        ({"images": [karpathy_image(split="a/b")]}, "'split' is 'a/b'"),
        ({"images": [karpathy_image(split=None)]}, "'split' is None"),
        ({"images": [karpathy_image(sentences="A man")]}, "'sentences' is 'A man'; expected a list"),
        ({"images": [karpathy_image(sentences=[{"text": "A"}])]}, r"sentences\[0\]: key 'raw' is missing"),
        ({"images": [karpathy_image(sentences=[{"raw": 3}])]}, "'raw' is 3; expected a string"),
        ({"images": [karpathy_image(sentences=[{"raw": "A", "sentid": 1.5}])]}, "'sentid' is 1.5"),
        ({"images": [karpathy_image(0), karpathy_image(1, sentences=[{"raw": "A", "sentid": 0}])]}, "'sentid' is 0"),
        ({"images": [karpathy_image(imgid=True)]}, "'imgid' is True"),
        ({"images": [karpathy_image(captions=("\ud800",))]}, "not valid Unicode"),
        ({"images": []}, "no image with a caption"),
    ],
)
def test_karpathy_malformed(tmp_path, content, words):
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps(content))
    with pytest.raises(SourceFormatError, match=words) as error:
        load_captions(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_karpathy_cut_short_is_named_with_its_line(tmp_path):
    path = tmp_path / "dataset.json"
    path.write_text('{"images":\n [{"filename": "a.jpg"')
    with pytest.raises(SourceFormatError, match="line 2: not valid JSON"):
        load_captions(path)


# CSV and JSONL

ROWS = [
    {"image": "a.jpg", "caption": 'A "fast" man, running', "split": "train"},
    {"image": "sub/b.jpg", "caption": "Zwei Hunde spielen, \u00e4hnlich\u2028schnell", "split": "test"},
    {"image": "a.jpg", "caption": "Two\nlines", "split": "train"},
]


def write_csv(folder, rows, name="captions.csv", delimiter=","):
    path = folder / name
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize(
    "write",
    [
        write_csv,
        write_jsonl,
        lambda folder, rows: write_csv(folder, rows, "captions.tsv", "\t"),
        lambda folder, rows: write_csv(folder, [{"number": 1, **row} for row in rows]),
    ],
    ids=["csv", "jsonl", "tsv", "more columns"],
)
def test_csv_and_jsonl_read_to_the_same(tmp_path, write):
    source = load_captions(write(tmp_path, ROWS))
    assert flat(source.images) == [
        ("a.jpg", "train", [ROWS[0]["caption"], ROWS[2]["caption"]]),
        ("sub/b.jpg", "test", [ROWS[1]["caption"]]),
    ]
    assert [[caption.id for caption in image.captions] for image in source.images] == [[0, 2], [1]]
    assert [image.id for image in source.images] == ["a.jpg", "sub/b.jpg"]


@pytest.mark.parametrize("split", [None, "val"])
def test_split_defaults(tmp_path, split):
    rows = [{"image": "a.jpg", "caption": "A man"}]
    options = {} if split is None else {"default_split": split}
    for path in (write_csv(tmp_path, rows), write_jsonl(tmp_path, rows)):
        assert load_captions(path, **options).images[0].split == (split or "train")


def test_a_byte_order_mark_and_windows_line_ends_do_not_matter(tmp_path):
    path = tmp_path / "captions.csv"
    path.write_bytes(b"\xef\xbb\xbfimage,caption\r\na.jpg,A man\r\n\r\nb.jpg,A dog\r\n")
    assert flat(load_captions(path).images) == [("a.jpg", "train", ["A man"]), ("b.jpg", "train", ["A dog"])]


def test_rows_without_caption_or_image_are_counted(tmp_path):
    rows = [{"image": "a.jpg", "caption": ""}, {"image": "", "caption": "Lost"}, {"image": "b.jpg", "caption": "Kept"}]
    for path in (write_csv(tmp_path, rows), write_jsonl(tmp_path, rows)):
        source = load_captions(path)
        assert flat(source.images) == [("b.jpg", "train", ["Kept"])]
        assert kinds(source) == ["empty_caption", "caption_without_image", "image_without_caption"]
        assert f"{path} line" in source.skipped[0].reason


def test_a_caption_of_any_length_is_kept(tmp_path):
    caption = " ".join(f"word{n}" for n in range(5000))
    for write in (write_csv, write_jsonl):
        assert flat(load_captions(write(tmp_path, [{"image": "a.jpg", "caption": caption}])).images)[0][2] == [caption]


def test_paths_are_normalised_so_that_one_file_is_one_image(tmp_path):
    rows = [{"image": name, "caption": name} for name in ("./a.jpg", "a.jpg", "s//b.jpg", "s/b.jpg")]
    assert [image.path for image in load_captions(write_jsonl(tmp_path, rows)).images] == ["a.jpg", "s/b.jpg"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("file,caption\na.jpg,A man\n", "line 1: the header is 'file,caption'; expected the columns image, caption"),
        ("image,caption,caption\n", "line 1: the header"),
        ("image,caption\na.jpg,A man, running\n", "line 2: 3 fields"),
        ("image,caption\na.jpg\n", "line 2: 1 fields"),
        ('image,caption\na.jpg,A man\nb.jpg,"A dog\nc.jpg,A cat\n', "line 3: not valid CSV"),
        ('image,caption\nb.jpg,"A" dog\n', "line 2: not valid CSV"),
        ("image,caption,split\na.jpg,A man,../x\n", "line 2: 'split' is '../x'"),
        ("image,caption,split\na.jpg,A man,test\na.jpg,A dog,val\n", "line 3: 'split' is 'val' but line 2"),
        ("image,caption\n", "no image with a caption"),
    ],
)
def test_csv_malformed(tmp_path, text, words):
    path = tmp_path / "captions.csv"
    path.write_text(text)
    with pytest.raises(SourceFormatError, match=words) as error:
        load_captions(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_csv_lines_are_counted_through_quoted_line_breaks(tmp_path):
    path = tmp_path / "captions.csv"
    path.write_text('image,caption\na.jpg,"one\ntwo\nthree"\nb.jpg,x,y\n')
    with pytest.raises(SourceFormatError, match="line 5: 3 fields"):
        load_captions(path)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"image": "b.jpg", "caption": "cut', r"line 3: not valid JSON \(.*\); line seen: .*cut"),
        ('["b.jpg", "A dog"]', "line 3: .*expected a JSON object"),
        ('{"image": "b.jpg"}', "line 3: key 'caption' is missing; keys seen: 'image'"),
        ('{"image": "b.jpg", "caption": ["A dog"]}', r"line 3: 'caption' is \['A dog'\]; expected a string"),
        ('{"image": 3, "caption": "A dog"}', "line 3: 'image' is 3; expected a string"),
        ('{"image": "b.jpg", "caption": "A dog", "split": 3}', "line 3: 'split' is 3"),
    ],
)
def test_jsonl_malformed(tmp_path, line, words):
    path = tmp_path / "captions.jsonl"
    path.write_text('{"image": "a.jpg", "caption": "A man"}\n\n' + line + "\n")
    with pytest.raises(SourceFormatError, match=words) as error:
        load_captions(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["/etc/a.jpg", "../a.jpg", "s/../../a.jpg", "s\\..\\a.jpg", "a\0.jpg", "."])
def test_images_outside_the_folder_are_refused(tmp_path, name):
    with pytest.raises(SourceFormatError, match=r"line 1: image file .* is refused"):
        load_captions(write_jsonl(tmp_path, [{"image": name, "caption": "A man"}]))
    with pytest.raises(SourceFormatError, match=r"images\[0\]: image file .* is refused"):
        load_captions(write_karpathy(tmp_path, karpathy_image(filename=name)))
    if name != ".":
        with pytest.raises(SourceFormatError, match=r"images\[0\]: image file .* is refused"):
            load_captions(write_karpathy(tmp_path, karpathy_image(filepath=name)))


def test_the_format_must_be_known(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_text("image,caption\na.jpg,A man\n")
    with pytest.raises(SourceFormatError, match=r"suffix '.txt' doesn't tell.*--format"):
        load_captions(path)
    with pytest.raises(SourceFormatError, match="expected one of auto, karpathy, csv, jsonl"):
        load_captions(path, format="xml")
    assert flat(load_captions(path, format="csv").images) == [("a.jpg", "train", ["A man"])]


def test_files_that_cannot_be_read(tmp_path):
    for name in ("no.json", "no.csv", "no.jsonl"):
        with pytest.raises(SourceFormatError, match=f"{name}: can't be read .No such file"):
            load_captions(tmp_path / name)
    latin = tmp_path / "latin.csv"
    latin.write_bytes("image,caption\na.jpg,Ein Bär\n".encode("latin-1"))
    with pytest.raises(SourceFormatError, match="line 2: not UTF-8"):
        load_captions(latin)
    (tmp_path / "utf16.json").write_bytes('{"images": []}'.encode("utf-16"))
    with pytest.raises(SourceFormatError, match="not UTF-8"):
        load_captions(tmp_path / "utf16.json")


# Knowledge

TRIPLETS = {
    "triplets": [{"subject": "man", "action": "runs", "object": "", "kind": "action"}],
    "states": ["Legs apart"],
}


@pytest.fixture
def images(tmp_path) -> list[CaptionedImage]:
    path = write_karpathy(
        tmp_path, karpathy_image(1, captions=("A man runs", "Another")), karpathy_image(2, filepath="s")
    )
    return load_captions(path).images


def attach(folder, images, *records):
    return attach_knowledge(images, write_jsonl(folder, records, "knowledge.jsonl"))


def test_knowledge_by_sentid(tmp_path, images):
    report = attach(
        tmp_path,
        images,
        {"sentid": 11, **TRIPLETS},
        {"sentid": "20", "triplets": [], "states": []},
        {"sentid": 99, **TRIPLETS},
    )
    assert (report.records, report.attached, report.unused) == (3, 2, 1)
    assert images[0].captions[0].knowledge is None
    assert json.loads(images[0].captions[1].knowledge) == TRIPLETS
    assert json.loads(images[1].captions[0].knowledge) == {"triplets": [], "states": []}


@pytest.mark.parametrize("name", ["2.jpg", "s/2.jpg"])
def test_knowledge_by_image_and_caption(tmp_path, images, name):
    report = attach(tmp_path, images, {"image": name, "caption": " A man runs ", **TRIPLETS})
    assert (report.attached, report.unused) == (1, 0)
    assert images[0].captions[0].knowledge is None
    assert json.loads(images[1].captions[0].knowledge) == TRIPLETS


def test_knowledge_said_twice_is_fine_if_it_is_the_same(tmp_path, images):
    assert attach(tmp_path, images, {"sentid": 10, **TRIPLETS}, {"sentid": 10, **TRIPLETS}).attached == 1


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (TRIPLETS, "line 2: no key says which caption this is; .* keys seen: 'triplets, states'"),
        ({"image": "1.jpg", **TRIPLETS}, "line 2: no key says which caption"),
        ({"sentid": None, **TRIPLETS}, "line 2: 'sentid' is None"),
        ({"sentid": 10, "triplets": [], "states": []}, "line 2: other knowledge of the same caption stands in line 1"),
        ({"sentid": 11, "image": "9.jpg", **TRIPLETS}, "line 2: 'image' is '9.jpg' but sentid 11 .* has '1.jpg'"),
        ({"sentid": 11, "caption": "A dog", **TRIPLETS}, "line 2: 'caption' is 'A dog' but sentid 11"),
        ({"sentid": 11, "image": 9, **TRIPLETS}, "line 2: 'image' is 9; expected a string"),
        ({"sentid": 11, "triplets": []}, "line 2: key 'states' is missing"),
        ({"sentid": 11, "triplets": [{}], "states": [""]}, r"line 2: triplets\[0\]: key 'subject' is missing"),
        ([11], "line 2: .* expected a JSON object"),
    ],
)
def test_knowledge_malformed(tmp_path, images, record, words):
    with pytest.raises(AmpError, match=words) as error:
        attach(tmp_path, images, {"sentid": 10, **TRIPLETS}, record)
    assert "knowledge.jsonl line 2" in str(error.value)


def test_knowledge_of_another_data_set_is_refused(tmp_path, images):
    with pytest.raises(SourceFormatError, match="none of its 2 records belongs to a caption"):
        attach(tmp_path, images, {"sentid": 500, **TRIPLETS}, {"sentid": 501, **TRIPLETS})
    with pytest.raises(SourceFormatError, match="no record in it"):
        attach(tmp_path, images)


def test_image_list(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("a.jpg\n\n s/b.jpg \r\n")
    assert load_image_list(path) == ["a.jpg", "s/b.jpg"]
    path.write_text("\n")
    with pytest.raises(SourceFormatError, match="no image named"):
        load_image_list(path)


@pytest.mark.skipif(not FLICKR8K.is_dir(), reason="needs Flickr8k's captions in ../shared/data/flickr8k")
def test_flickr8k_counts():
    source = load_captions(FLICKR8K / "dataset_flickr8k.json")
    entries = json.loads((FLICKR8K / "dataset_flickr8k.json").read_text())["images"]
    assert flat(source.images) == [
        (entry["filename"], entry["split"], [sentence["raw"].strip() for sentence in entry["sentences"]])
        for entry in entries
    ]
    assert source.skipped == []
