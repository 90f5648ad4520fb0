"""Damaged images, shards, captions, replies and adapters: each is accepted or refused as documented, never a traceback.

Hypothesis damages valid files and looks for the smallest damage that fails a test. Checksums are corrected, so that
they don't detect the damage. `--hypothesis-seed=1` with ``HYPOTHESIS_EXAMPLES=20`` tests twenty times as many cases.
"""

import io
import json
import os
import re
import struct
import tarfile
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import save
from support.photos import encoded

from amp.data.captions import load_captions
from amp.data.captions.knowledge_file import attach_knowledge
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
from amp.model.adapter import FORMAT, AdapterHeader, read_adapter
from amp.model.config import PromptConfig

MORE = int(os.environ.get("HYPOTHESIS_EXAMPLES", "1"))
MEMORY = 3 * 2**30  # address space of a case, in addition to that of the libraries
SECONDS = 30  # for one case, on a busy machine
NUMBERS = (0, 1, 7, 127, 128, 255, 256, 32767, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
CHANGES = ("big", "little", "big", "little", "cut", "remove", "repeat", "insert", "splice")
CAPTION = "Two small dogs jump over a red hurdle while a man watches them"

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True, scope="module")
def limited_memory():
    """Limits the memory; a case that needs more fails with a MemoryError."""
    resource = pytest.importorskip("resource")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@st.composite
def damaged(draw, files: list[bytes], repair=bytes) -> bytes:
    """A file with one to four changes, half of them near its beginning, where the headers are."""
    content = draw(st.sampled_from(files))
    for change in draw(st.lists(st.sampled_from(CHANGES), min_size=1, max_size=4)):
        at = draw(st.integers(0, draw(st.sampled_from((len(content), min(len(content), 400))))))
        end = at + draw(st.sampled_from((1, 2, 4, 16, 64, 512)))
        if change == "cut":
            end, new = len(content), b""
        elif change == "remove":
            new = b""
        elif change == "repeat":
            new = content[at:end] * 40
        elif change == "insert":
            end, new = at, draw(st.binary(max_size=64))
        elif change == "splice":
            end, new = len(content), draw(st.sampled_from(files))[at:]
        else:
            end = min(end, at + 4)
            number = draw(st.sampled_from(NUMBERS) | st.integers(0, 2**32 - 1)) % 256 ** (end - at)
            new = number.to_bytes(end - at, change)
        content = content[:at] + new + content[end:]
    return repair(content)


def outcomes(target, cases: st.SearchStrategy, examples: int) -> set[str]:
    """Outcomes of all cases. If `target` raises, the test fails with the smallest such case."""
    seen = set()

    @settings(
        max_examples=MORE * examples,
        derandomize=MORE == 1,
        database=None,
        deadline=1000 * SECONDS,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def run(case):
        seen.add(target(case))

    run()
    return seen


# -- images -----------------------------------------------------------------------------------------------------------


def drawn(mode: str = "RGB", seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 40, (36, 48, 3))
    ramp = np.add.outer(np.arange(36) * 3, np.arange(48) * 2)[..., None]
    return Image.fromarray(np.uint8((ramp + noise) % 256)).convert(mode)


def saved(kind: str, *images: tuple[str, dict]) -> list[bytes]:
    return [encoded(drawn(mode), kind, **options) for mode, options in images]


def exif() -> bytes:
    found = Image.Exif()
    found[0x0112], found[0x010E] = 6, "a description"
    found.get_ifd(0x8769)[0x9003] = "2020:01:01 00:00:00"
    return found.tobytes()


def text_of_a_png() -> PngInfo:
    text = PngInfo()
    text.add_text("Comment", "x" * 3000, zip=True)
    return text


def repaired_png(content: bytes) -> bytes:
    parts, at = [content[:8]], 8
    while at + 12 <= len(content):
        end = at + 8 + int.from_bytes(content[at : at + 4], "big")
        parts += [content[at:end], struct.pack(">I", zlib.crc32(content[at + 4 : end]))]
        at = end + 4
    return b"".join(parts)


ANIMATED = {"save_all": True, "append_images": [drawn(seed=1)]}
IMAGES = {
    "jpg": lambda: saved(
        "JPEG",
        ("RGB", {"progressive": True}),
        ("RGB", {"exif": exif(), "comment": b"hello", "icc_profile": b"\0" * 300}),
        ("RGB", {"restart_marker_blocks": 2}),
        ("L", {}),
        ("CMYK", {}),
    ),
    "png": lambda: saved(
        "PNG",
        ("RGB", {"exif": exif(), "icc_profile": b"\0" * 300}),
        ("RGBA", {"pnginfo": text_of_a_png()}),
        ("P", {"transparency": 3}),
        ("I;16", {}),
        ("1", {}),
        ("RGB", ANIMATED),
    ),
    "webp": lambda: saved("WEBP", ("RGB", {"exif": exif()}), ("RGBA", {"lossless": True}), ("RGB", ANIMATED)),
    "gif": lambda: saved("GIF", ("P", {}), ("L", {"interlace": 1}), ("RGB", ANIMATED | {"comment": b"hello"})),
    "bmp": lambda: saved("BMP", *((mode, {}) for mode in ("RGB", "P", "1", "RGBA", "L"))),
    "tif": lambda: saved(
        "TIFF",
        *(("RGB", {"compression": c}) for c in (None, "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")),
        ("1", {"compression": "group4"}),
        ("CMYK", {"exif": exif()}),
        ("I;16", {}),
        ("RGB", ANIMATED),
    ),
    "avif": lambda: saved("AVIF", ("RGB", {"exif": exif()}), ("RGBA", {"quality": 100}), ("RGB", ANIMATED)),
}


def documented(function, *arguments):
    """The result of the call, or None after an exception that the function documents."""
    try:
        return function(*arguments)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        assert "MemoryError" not in str(error)  # our own limits must apply first
        return None


@pytest.mark.parametrize("suffix", IMAGES)
def test_images(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"

    def read(content: bytes) -> str:
        path.write_bytes(content)
        size, pixels = jpeg_size(content), documented(decode_rgb, content)
        if size is not None and pixels is not None:
            assert pixels.shape == (*size, 3) and pixels.dtype == np.uint8
            small = documented(decode_rgb, content, 4)
            assert small is None or small.shape == (-(-size[0] // 4), -(-size[1] // 4), 3)
        documented(is_whole, content)
        photo = documented(open_photo, path)
        assert photo is None or photo.mode == "RGB"
        outcome = "skipped"
        for check, resize in (("structure", None), ("decode", None), ("decode", Resize(16))):
            try:
                kept, _ = read_image(path, resize, check)
            except UnreadableImageError:
                continue
            if check == "decode":
                outcome = "accepted"
                decode_rgb(kept)  # an image that conversion could decode must not stop a training run
        return outcome

    repair = repaired_png if suffix == "png" else bytes
    assert outcomes(read, damaged(IMAGES[suffix](), repair), 200) == {"accepted", "skipped"}


# -- shards and adapters ----------------------------------------------------------------------------------------------


def record(key: str) -> bytes:
    triplet = {"subject": "dog", "action": "jumps", "object": "", "kind": "action"}
    caption = {"text": CAPTION, "triplets": [triplet], "states": ["The dog is in the air"]}
    names = {"key": key, "image_id": key, "filename": f"{key}.jpg", "split": "train"}
    return json.dumps({"schema": 1, **names, "captions": [{"id": i, **caption} for i in range(2)]}).encode()


def tars() -> list[bytes]:
    found = []
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=format) as tar:
            for key in ("a", "b", "z" if format == tarfile.USTAR_FORMAT else "z" * 150):
                for name, content in ((f"{key}.jpg", b"J" * 700), (f"{key}.json", record(key))):
                    member = tarfile.TarInfo(name)
                    member.size, member.mtime = len(content), 0.5 if format == tarfile.PAX_FORMAT else 0
                    tar.addfile(member, io.BytesIO(content))
        found.append(out.getvalue().rstrip(b"\0") + bytes(2048))
    return found


def repaired_tar(content: bytes) -> bytes:
    blocks = [content[at : at + 512] for at in range(0, len(content), 512)]
    for number, block in enumerate(blocks):
        if block[257:262] == b"ustar" and len(block) == 512:
            total = sum(block[:148]) + 8 * 32 + sum(block[156:])
            blocks[number] = block[:148] + b"%06o\0 " % total + block[156:]
    return b"".join(blocks)


def refusing(target):
    """Wraps the target so that an AmpError is an outcome. Its message must be printable."""

    def run(content) -> str:
        try:
            target(content)
            return "accepted"
        except AmpError as error:
            str(error).encode("utf-8", "backslashreplace")
            return "refused"

    return run


def test_shards(tmp_path):
    @refusing
    def read(content):
        (tmp_path / "a.tar").write_bytes(content)
        with ShardReader(tmp_path / "a.tar") as reader:
            for number in range(len(reader)):
                for caption in reader.read(number)[1]["captions"]:
                    knowledge = parse_knowledge(caption, "a.tar")
                    parse_origin(caption, "a.tar")
                    json.dumps([caption["text"], knowledge.to_dict()], ensure_ascii=False).encode()

    assert outcomes(read, damaged(tars(), repaired_tar), 400) == {"accepted", "refused"}


def test_adapters(tmp_path):
    header = AdapterHeader("ViT-B-16", None, "ab" * 32, False, PromptConfig(), {"step": 3, "config": {"model": {}}})
    written = json.dumps(asdict(header)).encode()
    weights = {"gate": np.zeros(1, np.float32), "prompts": np.ones((2, 8), np.float32)}

    def adapter(header: bytes) -> bytes:
        return save(
            weights, metadata={"format": FORMAT, "format_version": "2", "header": header.decode("utf-8", "replace")}
        )

    @refusing
    def read(content):
        (tmp_path / "a.safetensors").write_bytes(content)
        found, _ = read_adapter(tmp_path / "a.safetensors")
        found.check_base("x", found.base_hash, tmp_path / "a.safetensors")

    assert outcomes(read, damaged([adapter(written)]) | edited([written]).map(adapter), 300) == {"accepted", "refused"}


# -- texts ------------------------------------------------------------------------------------------------------------

TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d+|[\[\]{}:,|\n]|true|false|null|\w+')
VALUES = (
    *b"1e999 -1e999 NaN Infinity null true 0 -1 1.5 [] {} , | ( ' \" ``` action: 1. <|im_end|>".split(),
    *(b'"%b"' % text for text in (b"", b"\\ud800", b"\\u0000", b"\\u202e\\u2066", b"\\u001b[2J", b"=cmd|x", b"<b>")),
    *(b'"%b"' % path for path in (b"../../etc/passwd", b"/etc/passwd", b".", b"a\\\\b")),
    *(b"9" * 400, b"9" * 5000, b"[" * 900, b"[" * 5000, b'{"a":' * 3000, b'"' + b"x" * 5000 + b'"', b" " * 3000),
    *(b"\xff\xfe", b"\0", b"\r", b"\n", b"\t" * 300, b"-" * 300, b"\xef\xbb\xbf", "\u2028\u202e".encode()),
)


@st.composite
def edited(draw, texts: list[bytes]) -> bytes:
    """A text with one to three tokens removed, doubled, or replaced by a value that is often handled wrongly."""
    content = draw(st.sampled_from(texts))
    for _ in range(draw(st.integers(1, 3))):
        tokens = [match.span() for match in TOKEN.finditer(content[:20_000])] or [(0, 0)]
        start, stop = draw(st.sampled_from(tokens))
        new = draw(st.sampled_from(VALUES) | st.sampled_from((b"", content[start:stop] * 2)) | st.binary(max_size=8))
        content = content[:start] + new + content[stop:]
    return content


def lines(*objects) -> bytes:
    return "".join(json.dumps(each) + "\n" for each in objects).encode()


CAPTIONS = lines({"image": "a.jpg", "caption": CAPTION, "split": "train"}, {"image": "b.jpg", "caption": "A cat"})
FILES = {
    "karpathy": json.dumps(
        {
            "images": [
                {
                    "filename": "a.jpg",
                    "filepath": "x",
                    "imgid": 3,
                    "split": "train",
                    "sentences": [{"raw": CAPTION, "sentid": 0}, {"raw": "A man runs", "sentid": 1}],
                },
                {"filename": "b.jpg", "split": "val", "sentences": [{"raw": "A cat"}]},
            ]
        }
    ).encode(),
    "jsonl": CAPTIONS,
    "csv": f'image,caption,split\na.jpg,"{CAPTION}",train\nb.jpg,"A ""big"" cat, too",val\n'.encode(),
    "knowledge": lines(
        {
            "sentid": 0,
            "image": "a.jpg",
            "caption": CAPTION,
            "triplets": [{"subject": "dog", "action": "jumps", "object": "", "kind": "action"}],
            "states": ["The dog is in the air"],
            "sources": [{"triplet": "strict", "state": "rules"}],
        },
        {"image": "b.jpg", "caption": "A cat", "triplets": [], "states": [], "empty": "none"},
    ),
    "manifest": json.dumps(
        {
            "format": "open-clip-amp shards",
            "version": 1,
            "splits": {
                "train": {
                    "samples": 1,
                    "captions": 2,
                    "shards": [{"name": "train-000000.tar", "samples": 1, "captions": 2, "bytes": 9, "sha256": "00"}],
                }
            },
        }
    ).encode(),
}


@pytest.mark.parametrize("kind", FILES)
def test_captions_knowledge_and_manifests(kind, tmp_path):
    path = tmp_path / ("manifest.json" if kind == "manifest" else "a.json")
    (tmp_path / "captions.jsonl").write_bytes(CAPTIONS)

    @refusing
    def read(content):
        path.write_bytes(content)
        if kind == "manifest":
            ShardManifest.load(tmp_path).to_dict()
            return
        if kind == "knowledge":
            images = load_captions(tmp_path / "captions.jsonl").images
            attach_knowledge(images, path)
        else:
            images = load_captions(path, kind).images
        for image in images:
            assert not image.path.startswith("/") and ".." not in image.path.split("/")
            parse_json(record_bytes("key", image))  # an accepted image can be written and read again

    texts = [FILES[kind]]
    assert outcomes(read, edited(texts) | damaged(texts), 250) == {"accepted", "refused"}


REPLIES = [
    b"action: dogs | jump over | red hurdle\nattribute: dogs | are | small",
    b"```\n1. (dogs, jump over, hurdle)\n2. (man, watches, them, action)\n```",
    b"subject: dogs; action: jump; object: hurdle\n- man -> watches -> them",
    b"1. The dogs fly with their legs stretched out.\n2. The man looks at them from the side.",
    b"Sure! Here are the triplets:\n* dogs\tjump\thurdle\n\nnone",
]


def test_replies():
    words = set(slot_words(CAPTION)) | {"is", "are", "was", "were"}

    def read(content: bytes) -> str:
        text = content.decode("utf-8", "replace")
        found = read_triplets(text, CAPTION)
        states = [state or "it is seen by somebody" for state, _ in read_states(text, len(found.triplets))]
        knowledge = Knowledge(found.triplets, tuple(states))
        assert parse_knowledge(knowledge.to_dict(), "reply") == knowledge
        assert len(found.triplets) <= MAX_TRIPLETS
        for triplet in found.triplets:
            assert set(f"{triplet.subject} {triplet.action} {triplet.object}".split()) <= words, triplet
        for state in states:
            assert len(state) <= MAX_STATE_CHARACTERS and state.isprintable()
        return "accepted" if found.usable else "refused"

    assert outcomes(read, edited(REPLIES) | damaged(REPLIES), 300) == {"accepted", "refused"}
