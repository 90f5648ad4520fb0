"""What damaged files are given to, and which endings are right: accepted, skipped, refused."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from amp.data.captions.knowledge_file import attach_knowledge
from amp.data.captions.load import load_captions
from amp.data.images.decode import decode_rgb
from amp.data.images.file import Resize, is_whole, open_photo, read_image
from amp.data.images.formats import UnreadableImageError
from amp.data.images.headers import jpeg_size
from amp.data.shards import ShardManifest, ShardReader
from amp.data.shards.record import record_bytes
from amp.errors import AmpError
from amp.generation.replies import MAX_STATE_CHARACTERS, MAX_TRIPLETS, read_states, read_triplets
from amp.generation.words import slot_words
from amp.json_text import parse_json
from amp.knowledge.schema import Knowledge, parse_knowledge, parse_origin

DECODING = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what `decode_rgb` documents
CAPTION = "Two small dogs jump over a red hurdle while a man watches them"


def corpus(kind: str) -> list[bytes]:
    """Whole files of a kind, always the same."""
    return _CORPORA[kind]()


def run(kind: str, content: bytes, folder: Path) -> str:
    """ "accepted", "skipped" or "refused"; any exception is a failure."""
    return _TARGETS.get(kind, _image)(content, folder, kind)


# -- images -----------------------------------------------------------------------------------------------------------

_SUFFIX = {"jpeg": "jpg", "tiff": "tif"}


def _image(content: bytes, folder: Path, kind: str) -> str:
    path = folder / f"a.{_SUFFIX.get(kind, kind)}"
    path.write_bytes(content)
    size = jpeg_size(content)
    pixels = _documented(decode_rgb, content)
    if size is not None and pixels is not None:
        assert pixels.shape == (*size, 3) and pixels.dtype == np.uint8
        small = _documented(decode_rgb, content, 4)
        assert small is None or small.shape == (-(-size[0] // 4), -(-size[1] // 4), 3)
    _documented(is_whole, content)
    photo = _documented(open_photo, path)
    assert photo is None or photo.mode == "RGB"
    outcome = "skipped"
    resized = [("decode", Resize(16))] if len(content) % 4 == 0 else []
    for check, resize in (("structure", None), ("decode", None), *resized):
        try:
            kept, _ = read_image(path, resize, check)
        except UnreadableImageError:
            continue
        if check == "decode":
            outcome = "accepted"
            decode_rgb(kept)  # what conversion has decoded must not stop a training run
    return outcome


def _documented(function: Callable, *arguments):
    try:
        return function(*arguments)
    except DECODING as error:
        if "MemoryError" in str(error):  # a limit of ours should have come first
            raise AssertionError(str(error)) from error
        return None


def _drawn(mode: str = "RGB", size: tuple[int, int] = (48, 36), seed: int = 0) -> Image.Image:
    """Smooth colours with some noise."""
    noise = np.random.default_rng(seed).integers(0, 40, (size[1], size[0], 3))
    ramp = np.add.outer(np.arange(size[1]) * 3, np.arange(size[0]) * 2)[..., None]
    return Image.fromarray(np.uint8((ramp + noise) % 256)).convert(mode)


def _saved(image: Image.Image, format: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def _exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x8298] = 6, "a description", "somebody"
    exif.get_ifd(0x8769)[0x9003] = "2020:01:01 00:00:00"
    return exif.tobytes()


def _jpegs() -> list[bytes]:
    whole = _drawn()
    options = [
        {},
        {"progressive": True},
        {"quality": 30, "subsampling": 0},
        {"exif": _exif(), "comment": b"hello"},
        {"optimize": True, "icc_profile": b"\0" * 300},
        {"restart_marker_blocks": 2},
    ]
    return [*(_saved(whole, "JPEG", **o) for o in options), _saved(_drawn("L"), "JPEG"), _saved(_drawn("CMYK"), "JPEG")]


def _pngs() -> list[bytes]:
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_text("Comment", "x" * 3000, zip=True)
    text.add_itxt("Title", "é", zip=True)
    return [
        _saved(_drawn(), "PNG"),
        _saved(_drawn("RGBA"), "PNG", pnginfo=text),
        _saved(_drawn("L"), "PNG"),
        _saved(_drawn("P"), "PNG", transparency=3),
        _saved(_drawn("1"), "PNG"),
        _saved(_drawn("I;16"), "PNG"),
        _saved(_drawn(), "PNG", exif=_exif(), icc_profile=b"\0" * 300),
        _saved(_drawn(), "PNG", save_all=True, append_images=[_drawn(seed=1)]),
    ]


def _webps() -> list[bytes]:
    return [
        _saved(_drawn(), "WEBP"),
        _saved(_drawn("RGBA"), "WEBP", lossless=True),
        _saved(_drawn(), "WEBP", save_all=True, append_images=[_drawn(seed=1)], exif=_exif()),
    ]


def _gifs() -> list[bytes]:
    return [
        _saved(_drawn("P"), "GIF"),
        _saved(_drawn("L"), "GIF", interlace=1),
        _saved(_drawn(), "GIF", save_all=True, append_images=[_drawn(seed=1)], comment=b"hello"),
    ]


def _bmps() -> list[bytes]:
    return [_saved(_drawn(mode), "BMP") for mode in ("RGB", "P", "1", "RGBA", "L")]


def _tiffs() -> list[bytes]:
    packed = [
        _saved(_drawn(), "TIFF", compression=c) for c in (None, "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")
    ]
    return [
        *packed,
        _saved(_drawn("1"), "TIFF", compression="group4"),
        _saved(_drawn("CMYK"), "TIFF"),
        _saved(_drawn("I;16"), "TIFF"),
        _saved(Image.fromarray(np.float32(_drawn("L")) / 255), "TIFF"),
        _saved(_drawn("LA"), "TIFF"),
        _saved(_drawn(), "TIFF", exif=_exif()),
        _saved(_drawn(), "TIFF", save_all=True, append_images=[_drawn(seed=1)]),
    ]


def _avifs() -> list[bytes]:
    options = [{}, {"exif": _exif()}, {"save_all": True, "append_images": [_drawn(seed=1)]}]
    return [*(_saved(_drawn(), "AVIF", **o) for o in options), _saved(_drawn("RGBA"), "AVIF", quality=100)]


# -- shards -----------------------------------------------------------------------------------------------------------


def _record(key: str, captions: int = 2) -> bytes:
    triplet = {"subject": "dog", "action": "jumps", "object": "", "kind": "action"}
    caption = {"text": CAPTION, "triplets": [triplet], "states": ["The dog is in the air"]}
    return json.dumps(
        {
            "schema": 1,
            "key": key,
            "image_id": key,
            "filename": f"{key}.jpg",
            "split": "train",
            "captions": [{"id": i, **caption} for i in range(captions)],
        }
    ).encode()


def _tars() -> list[bytes]:
    found = []
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=format) as tar:
            keys = ["a", "b", *(["k" * 150] if format != tarfile.USTAR_FORMAT else []), "z"]
            for key in keys:
                for name, content in ((f"{key}.jpg", b"J" * 700), (f"{key}.json", _record(key))):
                    member = tarfile.TarInfo(name)
                    member.size, member.mtime = len(content), 0.5 if format == tarfile.PAX_FORMAT else 0
                    tar.addfile(member, io.BytesIO(content))
        found.append(out.getvalue().rstrip(b"\0") + bytes(2048))
    return found


def _tar(content: bytes, folder: Path, kind: str) -> str:
    path = folder / "a.tar"
    path.write_bytes(content)
    try:
        with ShardReader(path) as reader:
            for number in range(len(reader)):
                _, record = reader.read(number)
                for caption in record["captions"]:
                    knowledge = parse_knowledge(caption, "a.tar")
                    parse_origin(caption, "a.tar")
                    json.dumps([caption["text"], knowledge.to_dict()], ensure_ascii=False).encode()
        return "accepted"
    except AmpError as error:
        str(error).encode()
        return "refused"


# -- texts ------------------------------------------------------------------------------------------------------------

# The first bytes of a text tell which reader gets it.
_READERS = {b"K": "karpathy", b"L": "jsonl", b"C": "csv", b"N": "knowledge", b"M": "manifest"}


def _jsons() -> list[bytes]:
    sentences = [{"raw": CAPTION, "sentid": 0}, {"raw": "A man runs", "sentid": 1}]
    karpathy = {
        "images": [
            {"filename": "a.jpg", "filepath": "x", "imgid": 3, "split": "train", "sentences": sentences},
            {"filename": "b.jpg", "split": "val", "sentences": [{"raw": "A cat"}]},
        ]
    }
    lines = [{"image": "a.jpg", "caption": CAPTION, "split": "train"}, {"image": "b.jpg", "caption": "A cat"}]
    knowledge = [
        {"sentid": 0, "image": "a.jpg", **parse_json(_record("a"))["captions"][0]},
        {"image": "b.jpg", "caption": "A cat", "triplets": [], "states": [], "empty": "none"},
    ]
    knowledge[0] = {k: v for k, v in knowledge[0].items() if k not in ("id", "text")} | {
        "caption": CAPTION,
        "sources": [{"triplet": "strict", "state": "rules"}],
    }
    shard = {"name": "train-000000.tar", "samples": 1, "captions": 2, "bytes": 9, "sha256": "00"}
    manifest = {
        "format": "open-clip-amp shards",
        "version": 1,
        "splits": {"train": {"samples": 1, "captions": 2, "shards": [shard]}},
    }
    rows = f'image,caption,split\na.jpg,"{CAPTION}",train\nb.jpg,"A ""big"" cat, too",val\n'
    return [
        b"K" + json.dumps(karpathy).encode(),
        b"M" + json.dumps(manifest).encode(),
        b"C" + rows.encode(),
        *(
            mark + "".join(json.dumps(x) + "\n" for x in found).encode()
            for mark, found in ((b"L", lines), (b"N", knowledge))
        ),
    ]


def _json(content: bytes, folder: Path, kind: str) -> str:
    reader = _READERS.get(content[:1], "jsonl")
    path = folder / ("manifest.json" if reader == "manifest" else "a.json")
    path.write_bytes(content[1:])
    try:
        if reader == "manifest":
            ShardManifest.load(folder).to_dict()
            return "accepted"
        if reader == "knowledge":
            given = folder / "captions.jsonl"
            given.write_bytes(_jsons()[3][1:])
            images = load_captions(given).images
            attach_knowledge(images, path)
        else:
            images = load_captions(path, reader).images
        for image in images:
            assert not image.path.startswith("/") and ".." not in image.path.split("/")
            parse_json(record_bytes("key", image))  # what was accepted can be written and read again
        return "accepted"
    except AmpError as error:
        str(error).encode()
        return "refused"


def _replies() -> list[bytes]:
    return [
        b"action: dogs | jump over | red hurdle\nattribute: dogs | are | small",
        b"```\n1. (dogs, jump over, hurdle)\n2. (man, watches, them, action)\n```",
        b"subject: dogs; action: jump; object: hurdle\n- man -> watches -> them",
        b"1. The dogs fly with their legs stretched out.\n2. The man looks at them from the side.",
        b"Sure! Here are the triplets:\n* dogs\tjump\thurdle\n\nnone",
    ]


def _reply(content: bytes, folder: Path, kind: str) -> str:
    text = content.decode("utf-8", "replace")
    found = read_triplets(text, CAPTION)
    states = [state or "it is seen by somebody" for state, _ in read_states(text, len(found.triplets))]
    knowledge = Knowledge(found.triplets, tuple(states))
    assert parse_knowledge(knowledge.to_dict(), "reply") == knowledge
    words = set(slot_words(CAPTION)) | {"is", "are", "was", "were"}
    assert len(found.triplets) <= MAX_TRIPLETS
    for triplet in found.triplets:
        assert set(f"{triplet.subject} {triplet.action} {triplet.object}".split()) <= words, triplet
    for state in states:
        assert len(state) <= MAX_STATE_CHARACTERS and state.isprintable()
    return "accepted" if found.usable else "refused"


# -- adapters ---------------------------------------------------------------------------------------------------------


def _adapters() -> list[bytes]:
    from dataclasses import asdict

    from safetensors.numpy import save

    from amp.model.adapter import FORMAT, AdapterHeader
    from amp.model.config import PromptConfig

    header = AdapterHeader("ViT-B-16", None, "ab" * 32, False, PromptConfig(), {"step": 3, "config": {"model": {}}})
    metadata = {"format": FORMAT, "header": json.dumps(asdict(header))}
    weights = [{"gate": np.zeros(1, np.float32), "prompts": np.ones((2, 8), np.float32)}, {"a": np.arange(4)}]
    return [save(x, metadata=metadata) for x in weights]


def _adapter(content: bytes, folder: Path, kind: str) -> str:
    from amp.model.adapter import read_adapter

    path = folder / "a.safetensors"
    path.write_bytes(content)
    try:
        header, _ = read_adapter(path)
        header.check_base("x", header.base_hash, path)
        return "accepted"
    except AmpError as error:
        str(error).encode("utf-8", "backslashreplace")
        return "refused"


_CORPORA = {
    "jpeg": _jpegs,
    "png": _pngs,
    "webp": _webps,
    "gif": _gifs,
    "bmp": _bmps,
    "tiff": _tiffs,
    "avif": _avifs,
    "tar": _tars,
    "json": _jsons,
    "reply": _replies,
    "adapter": _adapters,
}
_TARGETS = {"tar": _tar, "json": _json, "reply": _reply, "adapter": _adapter}


def case(kind: str, seed: int, number: int, files: list[bytes]) -> bytes:
    """The content of a case, the same on every machine."""
    from benchmarks.mutate import mutate

    random = Random(f"{seed}/{kind}/{number}")
    return mutate(random.choice(files), files, kind, random)
