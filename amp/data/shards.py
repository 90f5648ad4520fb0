"""What a folder of shards looks like, and how to read it: the manifest and random access to a shard.

A folder holds WebDataset tars, ``train-000000.tar`` and so on, and ``manifest.json``. A sample is two members,
``KEY.jpg`` (or another image extension, lower-cased) and ``KEY.json``::

    {"schema": 1, "key": KEY, "image_id": int | str, "filename": path under the images folder, "split": "train",
     "captions": [{"id": int | str, "text": str,
                   "triplets": [{"subject", "action", "object", "kind"}], "states": [str]}]}

and where known ``sources`` or ``empty`` of a caption (`amp.knowledge.schema.parse_origin`).

Any WebDataset reader reads these tars. Training wants more than a sequential reader gives: an order that is a pure
function of (seed, epoch) and a resume that skips without decoding. So a shard's headers are indexed once, after which
its samples are read by number.
"""

from __future__ import annotations

import os
import tarfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from amp.data.decode import DECODER_OF
from amp.errors import AmpError, shorten
from amp.files import sha256_of, write_json
from amp.json_text import parse_json
from amp.knowledge.schema import is_unicode

MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = "open-clip-amp shards"
MANIFEST_VERSION = 1
RECORD_SCHEMA = 1
IMAGE_EXTENSIONS = tuple(suffix[1:] for suffix in DECODER_OF)

MAX_MEMBER_BYTES = 1 << 29
"""Bytes of an image file or a record: half a gigabyte, more than any image that isn't a decompression bomb takes."""

_REMAKE = "make the shards again with amp make_shards"


class ShardFormatError(AmpError):
    """A manifest or a shard isn't what this module describes."""


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """A shard as the manifest lists it.

    Attributes:
        path: the tar file.
        samples: images in it.
        captions: captions in it.
        bytes: size of the tar file.
        sha256: of the tar file, hexadecimal.
    """

    path: Path
    samples: int
    captions: int
    bytes: int
    sha256: str

    @property
    def name(self) -> str:
        return self.path.name

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "samples": self.samples,
            "captions": self.captions,
            "bytes": self.bytes,
            "sha256": self.sha256,
        }


@dataclass(slots=True)
class ShardManifest:
    """``manifest.json``: the shards of each split, what was left out, and where everything came from.

    Attributes:
        root: the folder.
        splits: split name -> its shards, in order.
        captions_without_knowledge: split name -> captions that no knowledge record belongs to.
        skipped: kind of problem -> entries ``{"file" or "key", "reason", ...}``.
        excluded: split name -> images left out on request.
        provenance: source files with their sha256, resize, command.
        created_by: program and version.
    """

    root: Path
    splits: dict[str, list[ShardInfo]]
    captions_without_knowledge: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    excluded: dict[str, int] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    created_by: str = ""

    @classmethod
    def load(cls, root: str | Path) -> ShardManifest:
        """Read the manifest of a folder (or the manifest file itself).

        Raises:
            ShardFormatError: no folder given, no such folder, no manifest (an unfinished conversion has none), or not a
                manifest.
        """
        if not str(root):
            raise ShardFormatError("no folder of shards is given, expected one; add --data.shards DIR")
        root = Path(root)
        path = root if root.name == MANIFEST_NAME else root / MANIFEST_NAME
        root = path.parent
        try:
            content = parse_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            if not root.is_dir():
                raise ShardFormatError(f"{root}: no such folder; expected a folder of shards; {_REMAKE}") from None
            raise ShardFormatError(
                f"{path}: no such file; expected the manifest of finished shards (it is written last); {_REMAKE}"
            ) from None
        except (OSError, ValueError) as error:
            raise ShardFormatError(f"{path}: can't be read as JSON ({error}); {_REMAKE}") from None
        where = str(path)
        if _get(content, "format", str, where) != MANIFEST_FORMAT:
            raise ShardFormatError(
                f"{where}: 'format' is {shorten(content['format'])}; expected {MANIFEST_FORMAT!r}; "
                "give a folder made by amp make_shards"
            )
        if _get(content, "version", int, where) != MANIFEST_VERSION:
            raise ShardFormatError(
                f"{where}: 'version' is {content['version']}; this release reads version {MANIFEST_VERSION}; {_REMAKE}"
            )
        splits: dict[str, list[ShardInfo]] = {}
        without_knowledge: dict[str, int] = {}
        for split, entry in _get(content, "splits", dict, where).items():
            here = f"{where}: splits.{split}"
            shards = _get(entry, "shards", list, here)
            splits[split] = [_shard_info(root, shard, f"{here}.shards[{i}]") for i, shard in enumerate(shards)]
            for key in ("samples", "captions"):
                total = sum(getattr(shard, key) for shard in splits[split])
                if _get(entry, key, int, here) != total:
                    raise ShardFormatError(
                        f"{here}: '{key}' is {entry[key]}; expected {total}, the sum over the shards; {_REMAKE}"
                    )
            without_knowledge[split] = entry.get("captions_without_knowledge", 0)
        return cls(
            root=root,
            splits=splits,
            captions_without_knowledge=without_knowledge,
            skipped=content.get("skipped", {}),
            excluded=content.get("excluded", {}),
            provenance=content.get("provenance", {}),
            created_by=content.get("created_by", ""),
        )

    def split(self, name: str) -> list[ShardInfo]:
        """The shards of a split, in order, each checked to exist with the size that the manifest states.

        Raises:
            ShardFormatError: an unknown or empty split; a shard that is missing or of another size.
        """
        path = self.root / MANIFEST_NAME
        if name not in self.splits:
            known = ", ".join(self.splits) or "none"
            raise ShardFormatError(
                f"{path}: split {name!r} isn't there; splits present: {known}; choose one of them, or convert it with "
                "amp make_shards"
            )
        if not self.samples(name):
            raise ShardFormatError(f"{path}: split {name!r} holds no sample; expected at least one; {_REMAKE}")
        for shard in self.splits[name]:
            try:
                size = shard.path.stat().st_size
            except OSError as error:
                raise ShardFormatError(
                    f"{shard.path}: {error.strerror}, but {path} lists it; copy it here, or {_REMAKE}"
                ) from None
            if size != shard.bytes:
                raise ShardFormatError(
                    f"{shard.path}: {size} bytes; expected {shard.bytes} (from {path}); the copy is incomplete or the "
                    f"file was changed; copy it again, or {_REMAKE}"
                )
        return self.splits[name]

    def samples(self, split: str) -> int:
        """Images in a split."""
        return sum(shard.samples for shard in self.splits[split])

    def captions(self, split: str) -> int:
        """Captions in a split."""
        return sum(shard.captions for shard in self.splits[split])

    def verify(self) -> None:
        """Compare the sha256 of every shard with the manifest; reads all bytes.

        Raises:
            ShardFormatError: the first shard that differs.
        """
        for split in self.splits:
            for shard in self.split(split):
                digest = sha256_of(shard.path)
                if digest != shard.sha256:
                    raise ShardFormatError(
                        f"{shard.path}: sha256 is {digest}; expected {shard.sha256}, as in {MANIFEST_NAME}; copy it "
                        f"again, or {_REMAKE}"
                    )

    def to_dict(self) -> dict[str, Any]:
        """The content of ``manifest.json``."""
        return {
            "format": MANIFEST_FORMAT,
            "version": MANIFEST_VERSION,
            "created_by": self.created_by,
            "splits": {
                split: {
                    "samples": self.samples(split),
                    "captions": self.captions(split),
                    "captions_without_knowledge": self.captions_without_knowledge.get(split, 0),
                    "shards": [shard.to_dict() for shard in shards],
                }
                for split, shards in self.splits.items()
            },
            "skipped": self.skipped,
            "excluded": self.excluded,
            "provenance": self.provenance,
        }

    def save(self) -> Path:
        """Write ``manifest.json``; the file appears complete or not at all.

        Raises:
            ShardFormatError: the folder can't be written.
        """
        path = self.root / MANIFEST_NAME
        try:
            write_json(path, self.to_dict())
        except OSError as error:
            raise ShardFormatError(
                f"{path}: can't be written ({error.strerror}); make room or mend the folder"
            ) from None
        return path


class ShardReader:
    """Random access to the samples of one shard.

    The headers are read once, on construction. ``read`` uses ``os.pread``, which has no file position, so one reader
    serves several threads and survives a fork; pickling it (a spawned worker) opens the file anew.

    Args:
        path: a tar file.

    Attributes:
        keys: the sample keys, in the order of the tar.

    Raises:
        ShardFormatError: unreadable, cut short, empty, or with a member that has no place in a shard: pickles, links,
            devices, folders, absolute or parent paths, a key twice, a sample without its image or its record.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: int | None = None
        try:
            # Not blocking, or a named pipe of this name would hang here.
            self._file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            self.keys, self._spans = self._index()
        except OSError as error:
            self.close()
            raise ShardFormatError(
                f"{self.path}: can't be read ({error.strerror}); expected a tar shard; {_REMAKE}"
            ) from None
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self.keys)

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[ShardReader], tuple[Path]]:
        return ShardReader, (self.path,)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        file, self._file = getattr(self, "_file", None), None
        if file is not None:
            os.close(file)

    def read(self, index: int) -> tuple[bytes, dict[str, Any]]:
        """Sample number ``index``, 0-based: the image file's bytes, undecoded, and the record.

        Raises:
            IndexError: ``index`` outside ``range(len(self))``.
            ShardFormatError: the record isn't JSON, or of another schema or key.
        """
        return self.photo(index), self.record(index)

    def photo(self, index: int) -> bytes:
        """The image file's bytes of sample ``index`` alone."""
        return self._bytes(index, 0)

    def record(self, index: int) -> dict[str, Any]:
        """The record of sample ``index`` alone; errors as in :meth:`read`."""
        where = f"{self.path}: {self.keys[index]}.json"
        content = self._bytes(index, 1)
        try:
            record = parse_json(content)
        except ValueError as error:
            raise ShardFormatError(f"{where}: not JSON ({error}); {_REMAKE}") from None
        if _get(record, "schema", int, where) != RECORD_SCHEMA:
            raise ShardFormatError(
                f"{where}: 'schema' is {record['schema']}; this release reads schema {RECORD_SCHEMA}; {_REMAKE}"
            )
        if _get(record, "key", str, where) != self.keys[index]:
            raise ShardFormatError(f"{where}: 'key' is {shorten(record['key'])}; expected the member's name; {_REMAKE}")
        if not _get(record, "captions", list, where):
            raise ShardFormatError(f"{where}: 'captions' is empty; expected at least one caption; {_REMAKE}")
        for number, caption in enumerate(record["captions"]):
            here = f"{where}: captions[{number}]"
            _check_text(_get(caption, "text", str, here), f"{here}: 'text'")
            _check_id(caption.get("id", number), f"{here}: 'id'")
        _check_id(record.get("image_id", ""), f"{where}: 'image_id'")
        for name in ("filename", "split"):
            _check_text(record.get(name, ""), f"{where}: '{name}'")
        return record

    def _bytes(self, index: int, which: int) -> bytes:
        if not 0 <= index < len(self.keys):
            raise IndexError(f"{self.path}: sample {index} of {len(self.keys)}")
        if self._file is None:
            raise ValueError(f"{self.path}: read after close")
        offset, size = self._spans[index, which].tolist()
        content = os.pread(self._file, size, offset)
        if len(content) != size:
            raise ShardFormatError(
                f"{self.path}: {self.keys[index]}: {len(content)} bytes at offset {offset}; expected {size}; the file "
                f"was cut short while in use; {_REMAKE}"
            )
        return content

    def _index(self) -> tuple[list[str], np.ndarray]:
        """Keys (n), and int64 (n, 2, 2): for image and record, the offset and the size in bytes."""
        assert self._file is not None
        found: dict[str, dict[str, tuple[int, int]]] = {}
        last_key = None
        with open(self._file, "rb", closefd=False) as file:
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    for member in tar:
                        key, slot = self._check_member(member)
                        sample = found.setdefault(key, {})
                        if slot in sample or (sample and key != last_key):
                            raise ShardFormatError(f"{self.path}: {member.name}: key {key!r} occurs twice; {_REMAKE}")
                        sample[slot] = (member.offset_data, member.size)
                        last_key = key
                    end = tar.offset  # of the first block that is no header
            except (ShardFormatError, OSError):
                raise
            except Exception as error:  # tarfile raises nearly anything on damaged headers
                raise ShardFormatError(
                    f"{self.path}: not a readable tar file ({error or type(error).__name__}); expected an "
                    f"uncompressed tar shard; {_REMAKE}"
                ) from None
        # tarfile takes a damaged header or a missing end for the end of the archive, without a word. A whole archive
        # has at least two zero blocks behind its last member.
        if os.pread(self._file, 2 * tarfile.BLOCKSIZE, end) != bytes(2 * tarfile.BLOCKSIZE):
            raise ShardFormatError(
                f"{self.path}: damaged or cut short after {len(found)} samples (no end-of-archive marker); "
                f"copy it again, or {_REMAKE}"
            )
        if not found:
            raise ShardFormatError(f"{self.path}: the shard holds no sample; expected at least one; {_REMAKE}")
        for key, sample in found.items():
            for slot, expected in (("image", "an image"), ("json", "a .json record")):
                if slot not in sample:
                    raise ShardFormatError(f"{self.path}: sample {key!r} lacks {expected}; {_REMAKE}")
        spans = np.array([(sample["image"], sample["json"]) for sample in found.values()], dtype=np.int64)
        return list(found), spans

    def _check_member(self, member: tarfile.TarInfo) -> tuple[str, str]:
        """The sample key of a member and its slot, "image" or "json"."""
        where = f"{self.path}: member {shorten(member.name)}"
        if not member.isreg() or member.issparse():
            raise ShardFormatError(f"{where} is a link, a folder or a device; expected plain files only; {_REMAKE}")
        if not 0 <= member.size <= MAX_MEMBER_BYTES:
            raise ShardFormatError(
                f"{where} is of {shorten(member.size)} bytes; expected at most {MAX_MEMBER_BYTES}; {_REMAKE}"
            )
        if not is_unicode(member.name):
            raise ShardFormatError(f"{where} has a name that is not UTF-8; expected one that is; {_REMAKE}")
        name = PurePosixPath(member.name)
        if name.is_absolute() or ".." in name.parts:
            raise ShardFormatError(
                f"{where} has an absolute or parent path; expected a name inside the shard; {_REMAKE}"
            )
        # WebDataset's rule: the key ends at the first dot of the file's name.
        stem, _, extension = name.name.partition(".")
        slot = "json" if extension == "json" else "image" if extension in IMAGE_EXTENSIONS else None
        if slot is None or not stem:
            raise ShardFormatError(
                f"{where} isn't part of a sample; expected KEY.json or KEY with one of {', '.join(IMAGE_EXTENSIONS)} "
                f"(pickles are never read); {_REMAKE}"
            )
        return str(name.parent / stem), slot


def _get(content: Any, key: str, kind: type, where: str) -> Any:
    """``content[key]``, checked to be there and of type ``kind``."""
    if not isinstance(content, dict):
        raise ShardFormatError(f"{where}: {shorten(content)}; expected a JSON object; {_REMAKE}")
    if key not in content:
        seen = shorten(", ".join(content)) if content else "none"
        raise ShardFormatError(f"{where}: key '{key}' is missing; keys seen: {seen}; {_REMAKE}")
    if not isinstance(content[key], kind) or isinstance(content[key], bool):
        raise ShardFormatError(f"{where}: '{key}' is {shorten(content[key])}; expected {kind.__name__}; {_REMAKE}")
    return content[key]


def _check_text(value: Any, where: str) -> None:
    if not isinstance(value, str) or not is_unicode(value):
        raise ShardFormatError(f"{where} is {shorten(value)}; expected a text of valid Unicode; {_REMAKE}")


def _check_id(value: Any, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | str) or not is_unicode(str(value)):
        raise ShardFormatError(f"{where} is {shorten(value)}; expected a whole number or a text; {_REMAKE}")


def _count(content: Any, key: str, where: str) -> int:
    count = _get(content, key, int, where)
    if count < 0:
        raise ShardFormatError(f"{where}: '{key}' is {count}; expected 0 or more; {_REMAKE}")
    return count


def _shard_info(root: Path, content: Any, where: str) -> ShardInfo:
    name = _get(content, "name", str, where)
    if Path(name).name != name or name in ("", ".", ".."):
        raise ShardFormatError(f"{where}: 'name' is {shorten(name)}; expected a file name without a folder; {_REMAKE}")
    return ShardInfo(
        path=root / name,
        samples=_count(content, "samples", where),
        captions=_count(content, "captions", where),
        bytes=_count(content, "bytes", where),
        sha256=_get(content, "sha256", str, where),
    )
