"""Captions and knowledge files: all formats give the same result, and errors name the malformed line."""

import csv
import gzip
import json
import unicodedata

import pytest
from support.repository import SHARED, shared_folder

from amp.data.captions.base import SKIP_KINDS, Caption, CaptionedImage, CaptionSource, Skip
from amp.data.captions.knowledge_file import attach_knowledge
from amp.data.captions.load import load_captions
from amp.data.conversion.absolute_paths import make_relative
from amp.data.conversion.selection import load_image_list
from amp.errors import AmpError

FLICKR8K = SHARED / "data" / "flickr8k"


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
        ([], "no image with a caption"),
        (3, r": 3; expected a Karpathy file .*, COCO's annotations .* or a list .*'caption'}, ...\]\); check"),
        ({"image": []}, "an object with the keys 'image'; expected a Karpathy file"),
        ({"images": {}}, "'images' is {}; expected a list"),
        ({"images": ["a.jpg"]}, r"images\[0\]: 'a.jpg'; expected an object"),
        (
            {"images": [{"file_name": "a.jpg"}]},
            r"images\[0\]: key 'filename' is missing; .*seen: 'file_name'",
        ),
        ({"images": [karpathy_image(filename=3)]}, "'filename' is 3; expected a string"),
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
    with pytest.raises(AmpError, match=words) as error:
        load_captions(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_karpathy_cut_short_is_named_with_its_line(tmp_path):
    path = tmp_path / "dataset.json"
    path.write_text('{"images":\n [{"filename": "a.jpg"')
    with pytest.raises(AmpError, match="line 2: not valid JSON"):
        load_captions(path)


@pytest.mark.parametrize(
    ("text", "advice"),
    [("image,caption\na.jpg,A man\n", "--format csv"), ('{"image": 1}\n{"image": 2}\n', "--format jsonl")],
)
def test_a_table_named_json_gets_the_option_that_reads_it(tmp_path, text, advice):
    path = tmp_path / "captions.json"
    path.write_text(text)
    with pytest.raises(AmpError, match=f"not valid JSON.*{advice}"):
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


# Files as found in practice, all with the same three captions: file name, content, part of the message.
_HATS = "Zwei H\u00fcte; grau"
_TABLE = [("a.jpg", "A man, running"), ("s/b.jpg", _HATS), ("a.jpg", "A dog")]
_COMMAS = f'a.jpg,"A man, running"\ns/b.jpg,{_HATS}\na.jpg,A dog\n'
_SEMICOLONS = f'image;caption\na.jpg;A man, running\ns/b.jpg;"{_HATS}"\na.jpg;A dog\n'
_TABS = f"a.jpg\tA man, running\ns/b.jpg\t{_HATS}\na.jpg\tA dog\n"
_TOKENS = f"a.jpg#4\tA man, running\ns/b.jpg#0\t{_HATS}\n\na.jpg#1\tA dog\n"
FILES = {
    "semicolons": ("c.csv", _SEMICOLONS, "columns separated by semicolons"),
    "Excel's first line": ("c.csv", "sep=;\n" + _SEMICOLONS, "columns separated by semicolons"),
    "tabs": ("c.csv", "image\tcaption\n" + _TABS, "columns separated by tabs"),
    "a tsv": ("c.tsv", "image\tcaption\n" + _TABS, ""),
    "open_clip's": ("c.csv", "filepath\ttitle\n" + _TABS, "tabs, image from 'filepath', caption from 'title'"),
    "Flickr30k's": (
        "results.csv",
        "image_name| comment_number| comment\n" + "".join(f"{image}| 0| {text}\n" for image, text in _TABLE),
        "separated by '|', image from 'image_name', caption from 'comment'; columns not read: comment_number",
    ),
    "Flickr8k's": ("captions.txt", "image,caption\n" + _COMMAS, ""),
    "capitals": ("c.csv", "Image,CAPTION\n" + _COMMAS, ""),
    "other names": ("c.csv", "File Name,Text\n" + _COMMAS, "image from 'File Name', caption from 'Text'"),
    "spaces": ("c.csv", " image , caption \n" + _COMMAS.replace("jpg,", "jpg, "), ""),
    "empty columns": ("c.csv", "image,caption,,\n" + _COMMAS.replace("\n", ",,\n"), ""),
    "empty rows": ("c.csv", "\n\nimage,caption\n" + _COMMAS.replace("\n", "\n,\n"), ""),
    "pandas' index": ("c.csv", ",image,caption\n0," + _COMMAS[:-1].replace("\n", "\n1,"), ""),
    "texts of other kinds": (
        "c.csv",
        "path,text,image,caption\nx,y," + _COMMAS[:-1].replace("\n", "\nx,y,"),
        "not read: path, text",
    ),
    "Hugging Face's image folder": (
        "metadata.csv",
        "file_name,text\n" + _COMMAS,
        "image from 'file_name', caption from 'text'",
    ),
    "Hugging Face's image folder in JSONL": (
        "metadata.jsonl",
        "".join(json.dumps({"file_name": image, "text": text}) + "\n" for image, text in _TABLE),
        "image from 'file_name', caption from 'text'",
    ),
    "Flickr's tokens": ("Flickr8k.token", _TOKENS, ""),
    "Flickr's tokens in a txt": ("Flickr8k.token.txt", "\n" + _TOKENS, ""),
    "a list": ("c.json", json.dumps([{"image": image, "caption": text} for image, text in _TABLE]), ""),
    "a list with other names": (
        "c.json",
        json.dumps([{"file_name": image, "captions": [text]} for image, text in _TABLE]),
        "image from 'file_name', caption from 'captions'",
    ),
    "lists of captions": (
        "c.jsonl",
        "".join(json.dumps({"image": image, "captions": [text]}) + "\n" for image, text in _TABLE),
        "caption from 'captions'",
    ),
    "JSON's other names": (
        "c.jsonl",
        "".join(json.dumps({"file_name": image, "text": text}) + "\n" for image, text in _TABLE),
        "image from 'file_name', caption from 'text'",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_captions_as_people_have_them(tmp_path, name):
    """Separators, column names and Excel's variants; each also as Excel's "Unicode text", which is UTF-16."""
    file, text, note = FILES[name]
    path = tmp_path / file
    for encoding, pack in (("utf-8", bytes), ("utf-16", bytes), ("utf-8", gzip.compress), ("utf-16", gzip.compress)):
        path.write_bytes(pack(text.encode(encoding)))
        source = load_captions(path)
        assert flat(source.images) == [
            ("a.jpg", "train", ["A man, running", "A dog"]),
            ("s/b.jpg", "train", [_HATS]),
        ], encoding
        assert [caption.id for caption in source.images[0].captions] == [0, 2] and source.skipped == []
        assert note in " ".join(source.notes) and len(source.notes) == bool(note)


@pytest.mark.parametrize("ends", ["\r", "\r\n"])
def test_line_ends_of_other_systems(tmp_path, ends):
    path = tmp_path / "c.csv"
    path.write_bytes(f"image,caption{ends}a.jpg,A man{ends}{ends}b.jpg,A dog{ends}".encode())
    assert flat(load_captions(path).images) == [("a.jpg", "train", ["A man"]), ("b.jpg", "train", ["A dog"])]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_its_mark(tmp_path, encoding):
    path = tmp_path / "c.csv"
    path.write_bytes("image,caption\na.jpg,Ein Mädchen\n".encode(encoding))
    assert flat(load_captions(path).images) == [("a.jpg", "train", ["Ein Mädchen"])]


def test_an_empty_cell_is_skipped_in_every_format(tmp_path):
    """Empty cells are "", JSON's null, pandas' NaN, or missing at the end of a line."""
    csv_file, jsonl, nan = tmp_path / "c.csv", tmp_path / "c.jsonl", tmp_path / "nan.jsonl"
    csv_file.write_text("split,image,caption\n,a.jpg,\n,,Lost\n,b.jpg,Kept\n,b.jpg\n")
    jsonl.write_text(
        '{"image": "a.jpg", "caption": null}\n{"image": null, "caption": "Lost"}\n'
        '{"image": "b.jpg", "caption": "Kept", "split": null}\n{"image": "b.jpg", "caption": null}\n'
    )
    nan.write_text(jsonl.read_text().replace("null", "NaN"))
    whole = karpathy_image(2, captions=("Kept", None), filename="b.jpg")
    karpathy = write_karpathy(
        tmp_path, karpathy_image(1, captions=(None,), filename="a.jpg"), karpathy_image(3, filename=None), whole
    )
    for path in (csv_file, jsonl, nan, karpathy):
        source = load_captions(path)
        assert flat(source.images) == [("b.jpg", "train", ["Kept"])], path
        assert sorted(kinds(source)) == [
            "caption_without_image",
            "empty_caption",
            "empty_caption",
            "image_without_caption",
        ], path


def test_splits_are_stored_by_their_usual_names(tmp_path):
    names = {"Train": "train", "validation": "val", "TEST": "test", "fold1": "fold1", " train ": "train"}
    rows = [{"image": f"{i}.jpg", "caption": "A man", "split": name} for i, name in enumerate(names)]
    images = [karpathy_image(i, name) for i, name in enumerate(names) if name == name.strip()]
    for path in (write_csv(tmp_path, rows), write_jsonl(tmp_path, rows), write_karpathy(tmp_path, *images)):
        source = load_captions(path)
        assert [image.split for image in source.images] == list(names.values())[: len(source.images)]
        assert source.notes == [f"{path}: splits stored: 'Train' as 'train', 'validation' as 'val', 'TEST' as 'test'"]
    default = load_captions(write_jsonl(tmp_path, [{"image": "a.jpg", "caption": "A"}]), default_split="Dev")
    assert default.images[0].split == "val"


def test_one_image_may_name_its_split_in_two_cases_but_not_by_two_names(tmp_path):
    rows = [{"image": "a.jpg", "caption": "A", "split": "Train"}, {"image": "a.jpg", "caption": "B", "split": "train"}]
    assert load_captions(write_jsonl(tmp_path, rows)).images[0].split == "train"
    rows[1] = {"image": "b.jpg", "caption": "B", "split": "val"}
    rows[0]["split"] = "dev"
    with pytest.raises(AmpError, match="line 2: 'split' is 'val', but 'dev' was used above; both would be"):
        load_captions(write_jsonl(tmp_path, rows))


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
        (
            "id,caption\n1,A man\n",
            "line 1: the header has 2 columns separated by commas; column 'image' is missing; "
            "columns seen: 'id, caption'; expected 'image' or one of filepath",
        ),
        ("id;url;caption\n1;x;A, man\n", "3 columns separated by semicolons; column 'image' is missing"),
        ("image,caption,caption\n", "the columns 'caption' and 'caption' could each hold the caption"),
        ("image,title,text\n", "the columns 'title' and 'text' could each hold the caption; expected one; rename"),
        ("image\n", "the header has one column; column 'caption' is missing"),
        ("a.jpg,A man\nb.jpg,A dog\n", "names an image, so the header is missing; .*such as image,caption"),
        ("a.jpg\tA man\n", "names an image, so the header is missing"),
        ("a.jpg#0\tA man\na.jpg#1\tA dog\n", "line 1: .*Flickr's token file.*give --format token"),
        ('{"image": "a.jpg", "caption": "A man"}\n', "is JSON, not a header; give --format jsonl"),
        ("image,caption,,\na.jpg,A man, running,\n", "line 2: 4 fields.*quotes around a caption"),
        ("image,caption,,split\na.jpg,A man, running,train\n", "line 2: 4 fields.*quotes around a caption"),
        ("image,caption,split,x\na.jpg,A man,running\n", "line 2: 3 fields.*expected 4"),
        ("image;caption\na.jpg;A man; running\n", r"line 2: 3 fields.*expected 2 \(image, caption\) separated by semi"),
        ('raw,filename\n"[""A man"", ""A dog""]",a.jpg\n', "line 2: the caption is .*, a list; expected text"),
        ("image,caption\na.jpg,A man, running\n", "line 2: 3 fields"),
        ("image,caption\na.jpg\n", "no image with a caption.*skipped, first: .*line 2: 'caption' is empty"),
        ('image,caption\na.jpg,A man\nb.jpg,"A dog\nc.jpg,A cat\n', "line 3: not valid CSV"),
        ('image,caption\nb.jpg,"A" dog\n', "line 2: not valid CSV"),
        ("image,caption,split\na.jpg,A man,../x\n", "line 2: 'split' is '../x'"),
        ("image,caption,split\na.jpg,A man,test\na.jpg,A dog,val\n", "line 3: 'split' is 'val', but line 2"),
        ("image,caption\n", "no image with a caption"),
    ],
)
def test_csv_malformed(tmp_path, text, words):
    path = tmp_path / "captions.csv"
    path.write_text(text)
    with pytest.raises(AmpError, match=words) as error:
        load_captions(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_csv_lines_are_counted_through_quoted_line_breaks(tmp_path):
    path = tmp_path / "captions.csv"
    path.write_text('image,caption\na.jpg,"one\ntwo\nthree"\nb.jpg,x,y\n')
    with pytest.raises(AmpError, match="line 5: 3 fields"):
        load_captions(path)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"image": "b.jpg", "caption": "cut', r"line 3: not valid JSON \(.*\); line seen: .*cut"),
        ('["b.jpg", "A dog"]', "line 3: .*expected a JSON object"),
        ('{"image": "b.jpg"}', "line 3: key 'caption' is missing; keys seen: 'image'"),
        ('{"image": "b.jpg", "caption": ["A dog", 3]}', r"line 3: 'caption'\[1\] is 3; expected a string"),
        ('{"image": "b.jpg", "captions": [["A dog"]]}', r"line 3: 'caption'\[0\] is \['A dog'\]; expected a string"),
        ('{"image": "b.jpg", "caption": {"en": "A"}}', "line 3: 'caption' is {'en': 'A'}; expected a string"),
        ('{"image": ["b.jpg"], "caption": "A"}', r"line 3: 'image' is \['b.jpg'\]; expected a string"),
        ('{"image": "b.jpg", "text": "A", "title": "B"}', "line 3: the keys 'text' and 'title' could each hold"),
        ('{"image": "b.jpg", "caption": "A dog", "split": ["val"]}', r"line 3: 'split' is \['val'\]"),
        ('{"image": 3, "caption": "A dog"}', "line 3: 'image' is 3; expected a string"),
        ('{"image": "b.jpg", "caption": "A dog", "split": 3}', "line 3: 'split' is 3"),
    ],
)
def test_jsonl_malformed(tmp_path, line, words):
    path = tmp_path / "captions.jsonl"
    path.write_text('{"image": "a.jpg", "caption": "A man"}\n\n' + line + "\n")
    with pytest.raises(AmpError, match=words) as error:
        load_captions(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["/", "/p/../a.jpg", "../a.jpg", "s/../../a.jpg", "s\\..\\a.jpg", "a\0.jpg", "."])
def test_images_outside_the_folder_are_refused(tmp_path, name):
    with pytest.raises(AmpError, match=r"line 1: image file .* is not allowed"):
        load_captions(write_jsonl(tmp_path, [{"image": name, "caption": "A man"}]))
    with pytest.raises(AmpError, match=r"images\[0\]: image file .* is not allowed"):
        load_captions(write_karpathy(tmp_path, karpathy_image(filename=name)))
    if name not in (".", "/"):
        with pytest.raises(AmpError, match=r"images\[0\]: image file .* is not allowed"):
            load_captions(write_karpathy(tmp_path, karpathy_image(filepath=name)))


def test_the_format_must_be_known(tmp_path):
    path = tmp_path / "captions.dat"
    path.write_text("image,caption\na.jpg,A man\n")
    with pytest.raises(AmpError, match=r"suffix '.dat' belongs to no format.*--format"):
        load_captions(path)
    with pytest.raises(AmpError, match="expected one of auto, karpathy, csv, jsonl"):
        load_captions(path, format="xml")
    assert flat(load_captions(path, format="csv").images) == [("a.jpg", "train", ["A man"])]


def test_files_that_cannot_be_read(tmp_path):
    for name in ("no.json", "no.csv", "no.jsonl"):
        with pytest.raises(AmpError, match=f"{name}: can't be read .No such file"):
            load_captions(tmp_path / name)
    latin = tmp_path / "latin.csv"
    latin.write_bytes("image,caption\na.jpg,Ein Bär\n".encode("latin-1"))
    with pytest.raises(AmpError, match="line 2: not UTF-8"):
        load_captions(latin)
    (tmp_path / "utf16.json").write_bytes('{"images": []}'.encode("utf-16"))
    with pytest.raises(AmpError, match="no image with a caption"):
        load_captions(tmp_path / "utf16.json")


FOREIGN_FILES = {
    "a ZIP archive or a spreadsheet": b"PK\x03\x04\x14\0",
    "an old Excel file": b"\xd0\xcf\x11\xe0\xa1\xb1",
    "a Parquet file": b"PAR1\x15\x04",
    "compressed with gzip twice": gzip.compress(gzip.compress(b"image,caption\na.jpg,A man\n")),
    "a tar archive": b"a.jpg".ljust(257, b"\0") + b"ustar\x0000",
    "a web page": b"<!DOCTYPE html><html>404</html>",
}


@pytest.mark.parametrize("what", FOREIGN_FILES)
def test_files_that_are_no_captions_file_are_named_for_what_they_are(tmp_path, what):
    """Detected regardless of their suffix."""
    for suffix in (".csv", ".json", ".jsonl", ".unknown"):
        path = tmp_path / f"captions{suffix}"
        path.write_bytes(FOREIGN_FILES[what])
        with pytest.raises(AmpError, match=f"{path}: this is {what}.*expected a"):
            load_captions(path)


# COCO's annotations, lists, token files


def coco(*captions, images=((7, "a.jpg"), (9, "b.jpg"))):
    annotations = [{"id": 100 + i, "image_id": image, "caption": text} for i, (image, text) in enumerate(captions)]
    return {"images": [{"id": number, "file_name": name} for number, name in images], "annotations": annotations}


def write_json(folder, content, name="captions.json"):
    path = folder / name
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("captions_train2017.json", "train"),
        ("captions_val2017.json", "val"),
        ("Test.json", "test"),
        ("captions.json", "fold"),
        ("trainval.json", "fold"),
        ("train_val.json", "fold"),
    ],
)
def test_coco_annotations(tmp_path, name, split):
    path = write_json(tmp_path, coco((9, "A dog"), (7, " A man "), (9, "Two dogs")), name)
    source = load_captions(path, default_split="fold")
    assert source.images == [
        CaptionedImage("a.jpg", "a.jpg", 7, split, [Caption(101, "A man")]),
        CaptionedImage("b.jpg", "b.jpg", 9, split, [Caption(100, "A dog"), Caption(102, "Two dogs")]),
    ]
    assert source.skipped == [] and source.notes == [f"{path}: COCO's annotations, all in split {split!r}"]


def test_coco_gaps_are_counted_and_left_out(tmp_path):
    names = ((1, "a.jpg"), (2, "b.jpg"), (3, ""), (4, "./a.jpg"), (5, "c.jpg"))
    captions = ((1, "kept"), (1, " "), (8, "no image"), (3, "x"), (3, "y"), (4, "z"), (5, None))
    path = write_json(tmp_path, coco(*captions, images=names), "val.json")
    source = load_captions(path)
    assert flat(source.images) == [("a.jpg", "val", ["kept"])]
    assert source.skipped == [
        Skip("empty_caption", "a.jpg", f"{path}: annotations[1]: 'caption' is empty", "val", 1),
        Skip("caption_without_image", "", f"{path}: annotations[2]: 'image_id' is 8, which no image has", "val", 1),
        Skip("empty_caption", "c.jpg", f"{path}: annotations[6]: 'caption' is empty", "val", 1),
        Skip("caption_without_image", "", f"{path}: images[2]: 'file_name' is empty", "val", 2),
        Skip("duplicate_key", "a.jpg", f"{path}: images[3]: images[0] is the same file and was kept", "val", 1),
        Skip("image_without_caption", "b.jpg", "it has no caption", "val"),
        Skip("image_without_caption", "c.jpg", "it has no caption", "val"),
    ]


_SAME_ANNOTATION = coco((7, "A"))["annotations"] * 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"annotations": []}, "key 'images' is missing; expected a list; keys seen: 'annotations'"),
        ({"images": [], "annotations": {}}, "'annotations' is {}; expected a list"),
        (coco(images=[(7, "a.jpg"), (7, "b.jpg")]), r"images\[1\]: 'id' is 7, the same as in .*images\[0\]"),
        (coco() | {"annotations": _SAME_ANNOTATION}, r"annotations\[1\]: 'id' is 100, the same as in .*tions\[0\]"),
        (coco() | {"annotations": [{"id": 1, "image_id": 7, "bbox": []}]}, "'caption' is missing.*captions_val2017"),
        (coco((7, 3)), r"annotations\[0\]: 'caption' is 3; expected a string"),
        (coco((None, "A")), r"annotations\[0\]: 'image_id' is None"),
        (coco(images=[(7, "../a.jpg")]), r"images\[0\]: image file '../a.jpg' is not allowed"),
        (coco(images=[(7, 3)]), r"images\[0\]: 'file_name' is 3"),
        (coco(), "no image with a caption"),
    ],
)
def test_coco_malformed(tmp_path, content, words):
    path = write_json(tmp_path, content)
    with pytest.raises(AmpError, match=words) as error:
        load_captions(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_lists_of_captions(tmp_path):
    """Captions are numbered over the whole file, including empty ones."""
    rows = [
        {"image": "a.jpg", "caption": ["A man", "", "A dog"], "image_id": "coco_1", "split": "dev"},
        {"image": "b.jpg", "caption": []},
        {"image": "", "caption": ["x", "y"]},
        {"image": "a.jpg", "caption": "A cat", "image_id": None, "split": "dev"},
    ]
    captions = [Caption(0, "A man"), Caption(2, "A dog"), Caption(5, "A cat")]
    for path, image_id in ((write_json(tmp_path, rows), "coco_1"), (write_jsonl(tmp_path, rows), "a.jpg")):
        source = load_captions(path)
        assert source.images == [CaptionedImage("a.jpg", "a.jpg", image_id, "val", captions)]
        assert [(skip.kind, skip.file, skip.captions) for skip in source.skipped] == [
            ("empty_caption", "a.jpg", 1),
            ("caption_without_image", "", 2),
            ("image_without_caption", "b.jpg", 0),
        ]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("b.jpg", r"\[1\]: 'b.jpg'; expected an object"),
        ({"image": "b.jpg"}, r"\[1\]: key 'caption' is missing; keys seen: 'image'"),
        ({"image": "b.jpg", "caption": ["A", 3]}, r"\[1\]: 'caption'\[1\] is 3; expected a string"),
        ({"image": "b.jpg", "caption": '["A", "B"]'}, r"\[1\]: the caption is .*, a list; expected text"),
        ({"image": "b.jpg", "caption": "A", "image_id": 1.5}, r"\[1\]: 'image_id' is 1.5"),
        ({"image": "a.jpg", "caption": "A", "image_id": 4}, r"\[1\]: 'image_id' is 4, but \[0\] has 3"),
        ({"image": "a.jpg", "caption": "A", "split": "test"}, r"\[1\]: 'split' is 'test', but \[0\] puts"),
    ],
)
def test_list_malformed(tmp_path, entry, words):
    path = write_json(tmp_path, [{"image": "a.jpg", "caption": "A man", "image_id": 3}, entry])
    with pytest.raises(AmpError, match=words) as error:
        load_captions(path)
    assert str(path) in str(error.value)


def test_the_option_forces_a_format_of_json(tmp_path):
    """For example Karpathy's format for a file that also has COCO's key."""
    both = write_json(tmp_path, {"images": [karpathy_image(1)], "annotations": []})
    assert flat(load_captions(both, "karpathy").images) == [("1.jpg", "train", ["A man runs"])]
    with pytest.raises(AmpError, match=r"images\[0\]: key 'id' is missing"):
        load_captions(both)
    listed = write_json(tmp_path, [{"image": "a.jpg", "caption": "A"}], "list.dat")
    assert flat(load_captions(listed, "list").images) == [("a.jpg", "train", ["A"])]
    annotated = write_json(tmp_path, coco((7, "A")), "coco.dat")
    assert flat(load_captions(annotated, "coco").images) == [("a.jpg", "train", ["A"])]
    for path, format in ((listed, "coco"), (listed, "karpathy"), (annotated, "list")):
        with pytest.raises(AmpError, match=r"(a list of 1 values|keys 'images, annotations'); expected a Karpathy"):
            load_captions(path, format)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("b.jpg\tA dog", r"line 3: 'b.jpg\\tA dog'; expected IMAGE#NUMBER, a tab"),
        ("b.jpg#x\tA dog", "line 3: .*expected IMAGE#NUMBER"),
        ("b.jpg#0 A dog", "line 3: .*expected IMAGE#NUMBER"),
        ("#0\tA dog", "line 3: .*expected IMAGE#NUMBER"),
        ("a.jpg#0\tA dog", "line 3: 'a.jpg#0' is also the start of line 1; expected each number"),
        ("../b.jpg#0\tA dog", "line 3: image file '../b.jpg' is not allowed"),
    ],
)
@pytest.mark.parametrize("name", ["c.token", "c.txt"])
def test_token_file_malformed(tmp_path, name, line, words):
    path = tmp_path / name
    path.write_text(f"a.jpg#0\tA man\n\n{line}\n")
    with pytest.raises(AmpError, match=words) as error:
        load_captions(path)
    assert str(path) in str(error.value)


def test_token_file_with_tabs_and_signs_in_captions(tmp_path):
    path = tmp_path / "c.token"
    path.write_bytes(b"a#1.jpg#00\tPlayer #7\truns #2\t\r\na#1.jpg#01\t\r\n")
    source = load_captions(path)
    assert flat(source.images) == [("a#1.jpg", "train", ["Player #7\truns #2"])] and kinds(source) == ["empty_caption"]


# Compressed files


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.csv.gz", "image,caption\na.jpg,A man\n"),
        ("c.TSV.GZ", "image\tcaption\na.jpg\tA man\n"),
        ("c.jsonl.gz", '{"image": "a.jpg", "caption": "A man"}\n'),
        ("c.json.gz", '[{"image": "a.jpg", "caption": "A man"}]'),
        ("c.token.gz", "a.jpg#0\tA man\n"),
        ("c.txt.gz", "a.jpg#0\tA man\n"),
        ("c.csv", "image,caption\na.jpg,A man\n"),
    ],
)
def test_gzip(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()))
    source = load_captions(path)
    assert flat(source.images) == [("a.jpg", "train", ["A man"])] and source.notes == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bomb.json.gz", b"[" + b" " * 5000 + b"]", r"more than 4,000 bytes of text.*JSONL"),
        ("bomb.jsonl.gz", b"{" + b" " * 5000 + b"}", r"line 1: 2,000 bytes or more; expected one caption"),
        ("bomb.csv", ("image,caption\n" + "a" * 5000).encode("utf-16"), r"line 2: 2,000 bytes or more"),
    ],
)
def test_texts_without_end_are_not_read_into_memory(tmp_path, monkeypatch, name, content, message):
    monkeypatch.setattr("amp.data.captions.text_file.MAX_TEXT_BYTES", 4000)
    monkeypatch.setattr("amp.data.captions.text_file.MAX_LINE", 2000)
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(AmpError, match=message):
        load_captions(path)


@pytest.mark.parametrize("format", ["csv", "json"])
def test_gzip_damaged(tmp_path, format):
    path = tmp_path / "captions"
    whole = gzip.compress(b"image,caption\n" + b"".join(b"%d.jpg,%d dogs\n" % (n, n * n) for n in range(30_000)))
    for content in (whole[:-1], whole[: len(whole) // 2], whole[:4], whole[:-8] + b"12345678", whole + b"more"):
        path.write_bytes(content)
        with pytest.raises(AmpError, match=f"{path}: the gzip file is cut short or damaged") as error:
            load_captions(path, format)
        assert "\n" not in str(error.value)


def test_gzip_with_an_invalid_block(tmp_path):
    path = tmp_path / "captions.csv.gz"
    path.write_bytes(gzip.compress(b"image,caption\n")[:10] + b"\xff" * 20)
    with pytest.raises(AmpError, match=r"the gzip file is cut short or damaged .*invalid block type"):
        load_captions(path)


def test_gzip_without_a_known_suffix_below(tmp_path):
    path = tmp_path / "c.dat.gz"
    path.write_bytes(gzip.compress(b"image,caption\na.jpg,A man\n"))
    with pytest.raises(AmpError, match=r"suffix '.dat' belongs to no format"):
        load_captions(path)
    assert flat(load_captions(path, "csv").images) == [("a.jpg", "train", ["A man"])]


CASES = (
    *("flickr8k_captions.txt", "open_clip.csv", "semicolon.csv", "tab.csv", "flickr30k_results.csv"),
    *("captions_val2017.json", "list_of_captions.json", "list_of_captions.jsonl", "results_20130124.token"),
)


def test_files_of_the_same_photos_read_to_the_same():
    folder = shared_folder("cases/captions", "capitals.csv")
    with open(folder / "capitals.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    expected = {name: [] for name in ("0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg", "5.jpg")}
    for row in rows:
        expected[row["Image"]].append(row["Caption"].strip())
    assert all(len(captions) == 5 for captions in expected.values())
    for name in ("capitals.csv", *CASES):
        source = load_captions(folder / name)
        split = "val" if name == "captions_val2017.json" else "train"
        assert flat(source.images) == [(image, split, captions) for image, captions in expected.items()], name
        assert source.skipped == []
    languages = load_captions(folder / "other_languages.csv").images
    assert [image.path for image in languages] == list(expected)
    assert languages[3].captions == [Caption(3, "一只狗在草地上奔跑")]


# Absolute paths


def relative(folder, *rows, skipped=()):
    """The captions that a conversion with `--images photos` reads from (image, caption, split) rows."""
    rows = [{"image": str(image), "caption": text, "split": split} for image, text, split in rows]
    source = load_captions(write_jsonl(folder, rows))
    source.skipped += skipped
    make_relative(source, folder / "photos", "captions.jsonl")
    return source


def test_absolute_paths_inside_the_folder(tmp_path):
    """Every reader keeps absolute paths. If the folder is known, they are converted to relative paths."""
    photos = tmp_path / "photos"
    name = f"{photos}/s/a.jpg"
    (tmp_path / "c.token").write_text(f"{name}#0\tA man\n")
    (tmp_path / "c.csv").write_text(f"image,caption\n{name},A man\n")
    for path, image_id in (
        (tmp_path / "c.token", "s/a.jpg"),
        (tmp_path / "c.csv", "s/a.jpg"),
        (write_jsonl(tmp_path, [{"image": name, "caption": "A man"}]), "s/a.jpg"),
        (write_json(tmp_path, [{"image": name, "caption": "A man"}], "list.json"), "s/a.jpg"),
        (write_json(tmp_path, coco((7, "A man"), images=[(7, name)]), "coco.json"), 7),
        (write_karpathy(tmp_path, karpathy_image(1, captions=("A man",), filename=name)), 1),
    ):
        source = load_captions(path)
        assert [image.path for image in source.images] == [name], path
        make_relative(source, photos, str(path))
        assert flat(source.images) == [("s/a.jpg", "train", ["A man"])]
        assert (source.images[0].name, source.images[0].id) == ("s/a.jpg", image_id)


def test_an_absolute_and_a_relative_path_are_one_image(tmp_path):
    photos = tmp_path / "photos"
    gap = Skip("empty_caption", f"{photos}/c.jpg", "", "train", 1)
    rows = [(f"{photos}/a.jpg", "A", "train"), ("b.jpg", "B", "train"), ("a.jpg", "C", "train")]
    source = relative(tmp_path, *rows, skipped=[gap])
    assert flat(source.images) == [("a.jpg", "train", ["A", "C"]), ("b.jpg", "train", ["B"])]
    assert source.skipped == [Skip("empty_caption", "c.jpg", "", "train", 1)]
    with pytest.raises(AmpError, match=r"image file 'a.jpg' is in the splits 'train' and 'val'"):
        relative(tmp_path, (f"{photos}/a.jpg", "A", "train"), ("a.jpg", "C", "val"))


def test_absolute_paths_outside_the_folder_are_refused(tmp_path):
    photos = tmp_path / "photos"
    for name in ("/etc/a.jpg", f"{photos}2/a.jpg", str(photos)):
        with pytest.raises(AmpError, match=r"image file .* is not allowed; expected a path inside the im") as error:
            relative(tmp_path, ("b.jpg", "B", "train"), (name, "A", "train"))
        assert name[:60] in str(error.value) and f"folder {photos};" in str(error.value)


def test_absolute_paths_through_links_and_in_decomposed_unicode(tmp_path):
    (tmp_path / "real" / "Zürich").mkdir(parents=True)
    (tmp_path / "photos").symlink_to(tmp_path / "real")
    (tmp_path / "other").symlink_to(tmp_path / "real")
    for folder in ("photos", "real", "other"):
        source = relative(tmp_path, (tmp_path / folder / "Zürich" / "a.jpg", "A", "train"))
        assert flat(source.images) == [("Zürich/a.jpg", "train", ["A"])], folder
    (tmp_path / "photos" / "out").symlink_to(tmp_path)
    source = relative(tmp_path, (tmp_path / "photos" / "out" / "a.jpg", "A", "train"))
    assert source.images[0].path == "out/a.jpg"
    decomposed = unicodedata.normalize("NFD", f"{tmp_path}/real/Zürich/a.jpg")
    source = CaptionSource([CaptionedImage(decomposed, decomposed, decomposed, "train")], [])
    make_relative(source, tmp_path / "real" / "Zürich", "c.csv")
    assert source.images[0].path == "a.jpg"


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


@pytest.mark.parametrize("sentid", [{}, {"sentid": 0}])
def test_knowledge_names_a_caption_as_the_captions_file_spells_it(tmp_path, sentid):
    row = {"image": "./s//1.jpg ", "caption": " Un cafe\u0301 "}  # stored as s/1.jpg
    images = load_captions(write_jsonl(tmp_path, [row])).images
    assert attach(tmp_path, images, {**row, **sentid, **TRIPLETS}).attached == 1
    composed = {"image": "s/1.jpg", "caption": "Un caf\u00e9"}
    assert attach(tmp_path, images, {**composed, **sentid, **TRIPLETS}).attached == 1


@pytest.mark.parametrize("sentid", [{}, {"sentid": 0}])
@pytest.mark.parametrize("in_captions", ["s/1.jpg", "{}/s/1.jpg"])
@pytest.mark.parametrize("in_knowledge", ["s/1.jpg", "{}/s/1.jpg"])
def test_knowledge_with_absolute_paths(tmp_path, in_captions, in_knowledge, sentid):
    """One of the files may be older than a change of the paths."""
    captions, knowledge = (name.format(tmp_path) for name in (in_captions, in_knowledge))
    source = load_captions(write_jsonl(tmp_path, [{"image": captions, "caption": "A man"}]))
    make_relative(source, tmp_path, "captions.jsonl")
    records = write_jsonl(tmp_path, [{"image": knowledge, "caption": "A man", **sentid, **TRIPLETS}], "k.jsonl")
    assert attach_knowledge(source.images, records, tmp_path).attached == 1


def test_knowledge_with_absolute_paths_where_the_folder_is_unknown(tmp_path, images):
    """As when knowledge in shards is replaced."""
    record = {"sentid": 20, "image": "/photos/s/2.jpg", **TRIPLETS}
    assert attach(tmp_path, images, record).attached == 1
    with pytest.raises(AmpError, match=r"'image' is '/photos/s/12.jpg'; expected '2.jpg', which sentid 20 has"):
        attach(tmp_path, images, {**record, "image": "/photos/s/12.jpg"})


def test_knowledge_said_twice_is_fine_if_it_is_the_same(tmp_path, images):
    assert attach(tmp_path, images, {"sentid": 10, **TRIPLETS}, {"sentid": 10, **TRIPLETS}).attached == 1


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (TRIPLETS, "line 2: no key identifies the caption; keys seen: 'triplets, states'"),
        ({"image": "1.jpg", **TRIPLETS}, "line 2: no key identifies the caption"),
        ({"sentid": None, **TRIPLETS}, "line 2: 'sentid' is None"),
        ({"sentid": 10, "triplets": [], "states": []}, "line 2: line 1 has different knowledge for the same caption"),
        (
            {"sentid": 11, "image": "9.jpg", **TRIPLETS},
            "line 2: 'image' is '9.jpg'; expected .*1.jpg', which sentid 11 has",
        ),
        (
            {"sentid": 11, "caption": "A dog", **TRIPLETS},
            "line 2: 'caption' is 'A dog'; expected .* which sentid 11 has",
        ),
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
    with pytest.raises(AmpError, match="none of its 2 records matches a caption"):
        attach(tmp_path, images, {"sentid": 500, **TRIPLETS}, {"sentid": 501, **TRIPLETS})
    with pytest.raises(AmpError, match="no record in it"):
        attach(tmp_path, images)


def test_image_list(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("a.jpg\n\n s/b.jpg \r\n")
    assert load_image_list(path) == ["a.jpg", "s/b.jpg"]
    path.write_text("\n")
    with pytest.raises(AmpError, match="no file name in it"):
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
