"""Damage to files: bits, lengths, sizes and whole chunks, with checksums put right so that it gets past them."""

import re
import struct
import zlib
from collections.abc import Callable, Sequence
from random import Random

INTERESTING = (0, 1, 2, 7, 8, 127, 128, 255, 256, 32767, 32768, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
BLOCK = 512  # of a tar

Split = Callable[[bytes], list[bytes]]


def mutate(content: bytes, others: Sequence[bytes], kind: str, random: Random) -> bytes:
    """One to four changes of a file.

    Args:
        content: The file.
        others: Files of the same kind, to take parts from.
        kind: One of `KINDS`, which decides what chunks and sizes are.
        random: Decides everything.
    """
    changes = [_flip, _set, _cut, _remove, _repeat, _insert, _splice]
    if kind in _SPLITS:
        changes += [_chunks] * 3
    if kind in _FIELDS:
        changes += [_field] * 4
    if kind in ("json", "reply"):
        changes = [_flip, _cut, _remove, _repeat, _splice, *[_token] * 6]
    for _ in range(random.choice((1, 1, 1, 2, 2, 3, 4))):
        content = random.choice(changes)(content, others, kind, random)
    if kind == "png" and random.random() < 0.7:
        content = _mend_png(content)
    if kind == "tar" and random.random() < 0.8:
        content = _mend_tar(content)
    return content


def _place(content: bytes, random: Random) -> int:
    """Half of the places lie in the first 400 bytes, where headers are."""
    size = len(content) if random.random() < 0.5 else min(len(content), 400)
    return random.randrange(size) if size else 0


def _span(content: bytes, random: Random) -> tuple[int, int]:
    start = _place(content, random)
    return start, start + random.choice((1, 2, 4, 16, 64, 256, 1024))


def _flip(content: bytes, others, kind, random: Random) -> bytes:
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 8))):
        if changed:
            changed[_place(content, random)] ^= 1 << random.randrange(8)
    return bytes(changed)


def _set(content: bytes, others, kind, random: Random) -> bytes:
    """Bytes by others, or a number of some length by one that is often handled wrongly."""
    at, width = _place(content, random), random.choice((1, 2, 4))
    number = random.choice((*INTERESTING, random.randrange(2**32))) % 256**width
    return content[:at] + number.to_bytes(width, random.choice(("big", "little"))) + content[at + width :]


def _cut(content: bytes, others, kind, random: Random) -> bytes:
    return content[: random.randrange(len(content) + 1)]


def _remove(content: bytes, others, kind, random: Random) -> bytes:
    start, stop = _span(content, random)
    return content[:start] + content[stop:]


def _repeat(content: bytes, others, kind, random: Random) -> bytes:
    start, stop = _span(content, random)
    return content[:stop] + content[start:stop] * random.choice((1, 2, 50)) + content[stop:]


def _insert(content: bytes, others, kind, random: Random) -> bytes:
    at = _place(content, random)
    return content[:at] + random.randbytes(random.choice((1, 4, 32, 500))) + content[at:]


def _splice(content: bytes, others, kind, random: Random) -> bytes:
    """The beginning of this file and the end of another."""
    other = random.choice(others)
    return content[: _place(content, random)] + other[_place(other, random) :]


def _chunks(content: bytes, others, kind, random: Random) -> bytes:
    """Chunks exchanged, left out, doubled, or taken from another file."""
    parts = _SPLITS[kind](content)
    if len(parts) < 2:
        return content
    a, b = random.randrange(len(parts)), random.randrange(len(parts))
    how = random.randrange(4)
    if how == 0:
        parts[a], parts[b] = parts[b], parts[a]
    elif how == 1:
        del parts[a]
    elif how == 2:
        parts[a:a] = [parts[b]] * random.choice((1, 2, 40))
    else:
        parts[a] = random.choice(_SPLITS[kind](random.choice(others)) or [b""])
    return b"".join(parts)


def _field(content: bytes, others, kind, random: Random) -> bytes:
    """A length or size by another number."""
    fields = _FIELDS[kind](content)
    if not fields:
        return content
    at, width, order = random.choice(fields)
    number = random.choice((*INTERESTING, random.randrange(256**width), random.randrange(4000))) % 256**width
    return content[:at] + number.to_bytes(width, order) + content[at + width :]


# -- formats ----------------------------------------------------------------------------------------------------------


def _png_chunks(content: bytes) -> list[bytes]:
    parts, at = [content[:8]], 8
    while at + 12 <= len(content):
        size = 12 + int.from_bytes(content[at : at + 4], "big")
        parts.append(content[at : at + size])
        at += size
    return parts


def _mend_png(content: bytes) -> bytes:
    first, *chunks = _png_chunks(content)
    return first + b"".join(x[:-4] + struct.pack(">I", zlib.crc32(x[4:-4])) if len(x) >= 12 else x for x in chunks)


def _jpeg_segments(content: bytes) -> list[bytes]:
    parts, at = [content[:2]], 2
    while at + 4 <= len(content) and content[at] == 0xFF and content[at + 1] != 0xDA:
        size = 2 + int.from_bytes(content[at + 2 : at + 4], "big")
        parts.append(content[at : at + size])
        at += size
    return [*parts, content[at:]]


def _riff_chunks(content: bytes) -> list[bytes]:
    parts, at = [content[:12]], 12
    while at + 8 <= len(content):
        size = int.from_bytes(content[at + 4 : at + 8], "little")
        parts.append(content[at : at + 8 + size + size % 2])
        at += 8 + size + size % 2
    return parts


def _tar_blocks(content: bytes) -> list[bytes]:
    return [content[at : at + BLOCK] for at in range(0, len(content), BLOCK)]


def _mend_tar(content: bytes) -> bytes:
    """Checksums of what looks like a header."""
    blocks = _tar_blocks(content)
    for number, block in enumerate(blocks):
        if block[257:262] == b"ustar" and len(block) == BLOCK:
            total = sum(block[:148]) + 8 * 32 + sum(block[156:])
            blocks[number] = block[:148] + b"%06o\0 " % total + block[156:]
    return b"".join(blocks)


def _jpeg_fields(content: bytes) -> list[tuple[int, int, str]]:
    fields, at = [], 2
    for part in _jpeg_segments(content)[1:-1]:
        fields.append((at + 2, 2, "big"))
        if len(part) > 9 and part[1] in (0xC0, 0xC1, 0xC2):  # precision, height, width, components
            fields += [(at + 4, 1, "big"), *[(at + 5, 2, "big"), (at + 7, 2, "big")] * 2, (at + 9, 1, "big")]
        at += len(part)
    return fields


def _png_fields(content: bytes) -> list[tuple[int, int, str]]:
    fields, at = [(16, 4, "big"), (20, 4, "big"), (24, 1, "big"), (25, 1, "big"), (28, 1, "big")], 8
    for part in _png_chunks(content)[1:]:
        fields.append((at, 4, "big"))
        at += len(part)
    return fields


def _riff_fields(content: bytes) -> list[tuple[int, int, str]]:
    fields, at = [(4, 4, "little"), (20, 1, "little"), (24, 3, "little"), (27, 3, "little")], 12
    for part in _riff_chunks(content)[1:]:
        fields.append((at + 4, 4, "little"))
        at += len(part)
    return fields


def _tiff_fields(content: bytes) -> list[tuple[int, int, str]]:
    """Type, count and value of the entries of the first folder; strips, sizes and compression are among them."""
    at = int.from_bytes(content[4:8], "little")
    entries = int.from_bytes(content[at : at + 2], "little")
    starts = range(at + 2, min(at + 2 + 12 * entries, max(0, len(content) - 12)), 12)
    return [
        (4, 4, "little"),
        *(f for s in starts for f in ((s + 2, 2, "little"), (s + 4, 4, "little"), (s + 8, 4, "little"))),
    ]


def _avif_boxes(content: bytes) -> list[bytes]:
    parts, at = [], 0
    while at + 8 <= len(content):
        size = max(8, int.from_bytes(content[at : at + 4], "big"))
        parts.append(content[at : at + size])
        at += size
    return parts


def _avif_fields(content: bytes) -> list[tuple[int, int, str]]:
    """Sizes of boxes at any depth, width and height, and how the picture is turned."""
    found = []
    boxes = rb"ftyp|meta|hdlr|pitm|iloc|iinf|infe|iref|iprp|ipco|ipma|ispe|pixi|av1C|irot|mdat"
    for match in re.finditer(boxes, content):
        at, name = match.start(), match.group()
        found.append((max(0, at - 4), 4, "big"))
        if name in (b"ispe", b"iloc"):
            found += [(at + 8, 4, "big"), (at + 12, 4, "big")] * 2
        if name == b"irot":
            found.append((at + 4, 1, "big"))
    return found


def _tar_fields(content: bytes) -> list[tuple[int, int, str]]:
    """Sizes, types and the first letters of names; a size may be digits in base 8 or, from the top bit on, base 256."""
    found = []
    for number, block in enumerate(_tar_blocks(content)):
        if block[257:262] == b"ustar":
            at = number * BLOCK
            found += [
                *[(at + 124, 1, "big"), (at + 124, 8, "big"), (at + 132, 3, "big")] * 2,
                (at + 156, 1, "big"),
                (at, 2, "big"),
                (at + 157, 4, "big"),
            ]
    return found


_SPLITS: dict[str, Split] = {
    "png": _png_chunks,
    "jpeg": _jpeg_segments,
    "webp": _riff_chunks,
    "avif": _avif_boxes,
    "tar": _tar_blocks,
}
_FIELDS = {
    "png": _png_fields,
    "jpeg": _jpeg_fields,
    "webp": _riff_fields,
    "tiff": _tiff_fields,
    "avif": _avif_fields,
    "tar": _tar_fields,
    "gif": lambda content: [(6, 2, "little"), (8, 2, "little"), (10, 1, "little")],
    "bmp": lambda content: [(at, 4, "little") for at in range(10, 54, 4)] + [(26, 2, "little"), (28, 2, "little")],
    "adapter": lambda content: [(0, 8, "little"), (0, 2, "little"), (2, 2, "little")],
}

_VALUES = (
    b"1e999",
    b"-1e999",
    b"NaN",
    b"Infinity",
    b"null",
    b"true",
    b"0",
    b"-1",
    b"1.5",
    b"[]",
    b"{}",
    b'""',
    b'"\\ud800"',
    b'"\\u0000"',
    b'"\\u202e\\u2066"',
    b'"\\u001b[2J"',
    b'"../../etc/passwd"',
    b'"/etc/passwd"',
    b'"."',
    b'"a\\\\b"',
    b"9" * 400,
    b"9" * 5000,
    b"[" * 900,
    b"[" * 5000,
    b'{"a":' * 3000,
    b'"' + b"x" * 5000 + b'"',
    b"\xff\xfe",
    b"\0",
    b'"=cmd|x"',
    b'"<script>"',
    b"\r",
    b"\n",
    b",",
    b'"',
    b"'",
    b"\xef\xbb\xbf",
    b" | ",
    b"action: ",
    b"1. ",
    b"```",
    b" " * 3000,
    b"\t" * 300,
    b"(((",
    b"-" * 300,
    b"<|im_end|>",
    "\u2028\u202e\u0000".encode(),
)
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d+|[\[\]{}:,|\n]|true|false|null|\w+')


def _token(content: bytes, others, kind, random: Random) -> bytes:
    """A token of a text left out, doubled, or replaced by a value that is often handled wrongly."""
    tokens = [match.span() for match in _TOKEN.finditer(content[:20_000])]
    if not tokens:
        return random.choice(_VALUES)
    start, stop = random.choice(tokens)
    new = random.choice((b"", content[start:stop] * 2, *[random.choice(_VALUES)] * 6))
    return content[:start] + new + content[stop:]


KINDS = ("jpeg", "png", "webp", "gif", "bmp", "tiff", "avif", "tar", "json", "reply", "adapter")
