"""The manifest of a folder of shards."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amp.data.remote.location import Location, is_url
from amp.data.shards.index import SideFile, records_of
from amp.data.shards.reader import ShardReader
from amp.data.shards.record import REMAKE
from amp.errors import AmpError, shorten
from amp.files import sha256_of, write_json
from amp.json_text import parse_json, value_of

if TYPE_CHECKING:
    from amp.data.remote.cache import RemoteShard, ShardCache

MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = "open-clip-amp shards"
MANIFEST_VERSION = 1


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """The manifest's entry of a shard.

    Attributes:
        path: The tar file, local or remote.
        samples: Number of images.
        captions: Number of captions.
        bytes: Size of the tar file in bytes.
        sha256: SHA-256 of the tar file, hexadecimal.
        index: The index of the tar file; None for shards of older releases.
        records: The file of records next to the tar file; None if the tar file contains the records.
        side: Folder of the index and the file of records; None if they are next to the tar file.
    """

    path: Path | Location
    samples: int
    captions: int
    bytes: int
    sha256: str
    index: SideFile | None = None
    records: SideFile | None = None
    side: Path | None = None

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def local(self) -> Path:
        """The tar file of a local shard.

        Raises:
            AmpError: The shard is remote.
        """
        if not isinstance(self.path, Path):
            raise AmpError(f"{self.path}: a remote shard; expected a local one; copy the folder to a local disk first")
        return self.path

    @property
    def texts(self) -> str:
        """SHA-256 of the file that contains the captions and their knowledge."""
        return self.sha256 if self.records is None else self.records.sha256

    @property
    def indexed_path(self) -> Path:
        """Path next to which the index and the file of records are."""
        return self.local if self.side is None else self.side / self.name

    @property
    def photos(self) -> list[str]:
        """Hashes of the files that determine the photos and their order."""
        return [self.sha256] if self.records is None or self.index is None else [self.sha256, self.index.sha256]

    @property
    def remote(self) -> RemoteShard | None:
        """The files of a remote shard; None for a local one."""
        if isinstance(self.path, Path):
            return None
        from amp.data.remote.cache import RemoteShard

        return RemoteShard(self.path, SideFile(self.bytes, self.sha256), self.index, self.records, self.samples)

    def open(self, cache: ShardCache | None = None) -> ShardReader:
        """Opens the shard; raises like `ShardReader`. A remote shard is read through `cache`, if one is given."""
        if isinstance(self.path, Path):
            return ShardReader(self.path, self.index, self.records, self.samples, self.side)
        from amp.data.remote.reader import RemoteReader

        assert self.remote is not None
        return RemoteReader(self.remote, cache)

    def digest(self) -> str:
        """SHA-256 of the tar file as it is, hexadecimal, which reads all of it."""
        if isinstance(self.path, Path):
            return sha256_of(self.path)
        from amp.data.remote.fetch import sha256_at

        return sha256_at(self.path, self.bytes)

    def to_dict(self) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "name": self.name,
            "samples": self.samples,
            "captions": self.captions,
            "bytes": self.bytes,
            "sha256": self.sha256,
        }
        for name, file in (("index", self.index), ("records", self.records)):
            if file is not None:
                entry[name] = asdict(file)
        return entry


@dataclass(slots=True)
class ShardManifest:
    """`manifest.json`: the shards of each split, what was left out, and the sources of the data.

    Attributes:
        root: Folder of the shards, local or remote.
        splits: Shards of each split, in order, by the split's name.
        captions_without_knowledge: Number of captions without a knowledge record, by split.
        skipped: What was skipped, by kind of problem: entries `{"file", "reason", ...}`.
        excluded: Number of images left out on request, by split.
        provenance: Source files with their SHA-256, options, and command line.
        created_by: Program and version.
    """

    root: Path | Location
    splits: dict[str, list[ShardInfo]]
    captions_without_knowledge: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    excluded: dict[str, int] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    created_by: str = ""

    @classmethod
    def load(cls, root: str | Path | Location) -> ShardManifest:
        """Reads a manifest, given by its folder or by its own path, or by a URL of either.

        Raises:
            AmpError: `root` is empty or doesn't exist, or the manifest is missing (as after an unfinished conversion)
                or invalid.
        """
        if not str(root):
            raise AmpError("no folder of shards is given; add --data.shards DIR")
        if isinstance(root, str):
            root = Location.parse(root) if is_url(root) else Path(root)
        path = root if root.name == MANIFEST_NAME else root / MANIFEST_NAME
        root = path.parent
        try:
            content = parse_json(_text_of(path))
        except FileNotFoundError:
            if isinstance(root, Path) and not root.is_dir():
                raise AmpError(f"{root}: no such folder; expected a folder of shards; {REMAKE}") from None
            raise AmpError(
                f"{path}: no such file; expected the manifest of finished shards (it is written last); {REMAKE}"
            ) from None
        except AmpError:
            raise
        except (OSError, ValueError) as error:
            raise AmpError(f"{path}: can't be read as JSON ({error}); {REMAKE}") from None
        where = str(path)
        if value_of(content, "format", str, where, REMAKE) != MANIFEST_FORMAT:
            raise AmpError(
                f"{where}: 'format' is {shorten(content['format'])}; expected {MANIFEST_FORMAT!r}; "
                "give a folder made by amp make_shards"
            )
        if value_of(content, "version", int, where, REMAKE) != MANIFEST_VERSION:
            raise AmpError(
                f"{where}: 'version' is {content['version']}; this release reads version {MANIFEST_VERSION}; {REMAKE}"
            )
        splits: dict[str, list[ShardInfo]] = {}
        without_knowledge: dict[str, int] = {}
        for split, entry in value_of(content, "splits", dict, where, REMAKE).items():
            here = f"{where}: splits.{split}"
            shards = value_of(entry, "shards", list, here, REMAKE)
            tars = _folder_of_tars(entry, here, root)
            splits[split] = [_shard_info(root, tars, shard, f"{here}.shards[{i}]") for i, shard in enumerate(shards)]
            for key in ("samples", "captions"):
                total = sum(getattr(shard, key) for shard in splits[split])
                if value_of(entry, key, int, here, REMAKE) != total:
                    raise AmpError(
                        f"{here}: '{key}' is {entry[key]}; expected {total}, the sum over the shards; {REMAKE}"
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
        """The shards of a split, in order. Checks that each local one exists and has the size in the manifest.

        Raises:
            AmpError: The split is unknown or empty, or a shard is missing or has another size.
        """
        path = self.root / MANIFEST_NAME
        if name not in self.splits:
            known = ", ".join(self.splits) or "none"
            raise AmpError(
                f"{path}: split {name!r} doesn't exist; splits present: {known}; choose one of them, or convert split "
                f"{name!r} with amp make_shards"
            )
        if not self.samples(name):
            raise AmpError(f"{path}: split {name!r} holds no sample; expected at least one; {REMAKE}")
        for shard in self.splits[name]:
            if not isinstance(shard.path, Path):
                continue  # one request each; reading checks it
            try:
                size = shard.path.stat().st_size
            except OSError as error:
                raise AmpError(
                    f"{shard.path}: {error.strerror}, but {path} lists it; copy it here, or {REMAKE}"
                ) from None
            if size != shard.bytes:
                raise AmpError(
                    f"{shard.path}: {size} bytes; expected {shard.bytes} (from {path}); the copy is incomplete or the "
                    f"file was changed; copy it again, or {REMAKE}"
                )
        return self.splits[name]

    def samples(self, split: str) -> int:
        """Number of images in a split."""
        return sum(shard.samples for shard in self.splits[split])

    def captions(self, split: str) -> int:
        """Number of captions in a split."""
        return sum(shard.captions for shard in self.splits[split])

    def verify(self) -> None:
        """Compares the SHA-256 of every shard with the manifest, which reads all bytes.

        Raises:
            AmpError: A shard differs.
        """
        for split in self.splits:
            for shard in self.split(split):
                digest = shard.digest()
                if digest != shard.sha256:
                    raise AmpError(
                        f"{shard.path}: sha256 is {digest}; expected {shard.sha256} (from {MANIFEST_NAME}); copy it "
                        f"again, or {REMAKE}"
                    )
                if shard.records is not None and shard.remote is None:
                    path = records_of(shard.indexed_path)
                    if (digest := sha256_of(path)) != shard.records.sha256:
                        raise AmpError(
                            f"{path}: sha256 is {digest}; expected {shard.records.sha256} (from {MANIFEST_NAME}); copy "
                            f"it again, or {REMAKE}"
                        )

    def to_dict(self) -> dict[str, Any]:
        """The content of `manifest.json`."""
        return {
            "format": MANIFEST_FORMAT,
            "version": MANIFEST_VERSION,
            "created_by": self.created_by,
            "splits": {
                split: {
                    "samples": self.samples(split),
                    "captions": self.captions(split),
                    "captions_without_knowledge": self.captions_without_knowledge.get(split, 0),
                    **_tars_entry(shards),
                    "shards": [shard.to_dict() for shard in shards],
                }
                for split, shards in self.splits.items()
            },
            "skipped": self.skipped,
            "excluded": self.excluded,
            "provenance": self.provenance,
        }

    def save(self) -> Path:
        """Writes `manifest.json` atomically.

        Raises:
            AmpError: The folder can't be written.
        """
        assert isinstance(self.root, Path), "remote manifests are only read"
        path = self.root / MANIFEST_NAME
        try:
            write_json(path, self.to_dict())
        except OSError as error:
            raise AmpError(f"{path}: can't be written ({error.strerror}); make room or fix the folder") from None
        return path


def _text_of(path: Path | Location) -> str:
    if isinstance(path, Path):
        return path.read_text(encoding="utf-8")
    from amp.data.remote.fetch import read_whole

    return read_whole(path).decode("utf-8")


def _tars_entry(shards: list[ShardInfo]) -> dict[str, str]:
    """The manifest's key of the folder of the tar files, if they are not in the folder of the manifest."""
    return {"tars": str(shards[0].path.parent)} if shards and shards[0].side is not None else {}


def _folder_of_tars(content: dict[str, Any], where: str, root: Path | Location) -> Path | None:
    if "tars" not in content:
        return None
    tars = value_of(content, "tars", str, where, REMAKE)
    if not isinstance(root, Path):
        raise AmpError(
            f"{where}: 'tars' is {shorten(tars)}; expected the tar files next to a remote manifest; run amp "
            "index_shards without --out, and upload the tar files with their indexes to one folder"
        )
    # A relative path would change its meaning with the current folder.
    if not Path(tars).is_absolute() or "\0" in tars:
        raise AmpError(
            f"{where}: 'tars' is {shorten(tars)}; expected the absolute path of the folder of the tar files; correct "
            "it, or run amp index_shards again"
        )
    return Path(tars)


def _shard_info(root: Path | Location, tars: Path | None, content: Any, where: str) -> ShardInfo:
    name = value_of(content, "name", str, where, REMAKE)
    if Path(name).name != name or name in ("", ".", ".."):
        raise AmpError(f"{where}: 'name' is {shorten(name)}; expected a file name without a folder; {REMAKE}")
    records = _side_file(content, "records", where)
    if tars is not None and records is None:
        raise AmpError(f"{where}: key 'records' is missing; expected it in a split with 'tars'; {REMAKE}")
    return ShardInfo(
        path=(tars or root) / name,
        samples=_count(content, "samples", where),
        captions=_count(content, "captions", where),
        bytes=_count(content, "bytes", where),
        sha256=value_of(content, "sha256", str, where, REMAKE),
        index=_side_file(content, "index", where),
        records=records,
        side=root if tars is not None and isinstance(root, Path) else None,
    )


def _side_file(content: Any, key: str, where: str) -> SideFile | None:
    if key not in content:
        if key == "index" and "records" in content:
            raise AmpError(f"{where}: 'records' without 'index'; expected both or neither; {REMAKE}")
        return None
    entry, here = value_of(content, key, dict, where, REMAKE), f"{where}.{key}"
    return SideFile(_count(entry, "bytes", here), value_of(entry, "sha256", str, here, REMAKE))


def _count(content: Any, key: str, where: str) -> int:
    count = value_of(content, key, int, where, REMAKE)
    if count < 0:
        raise AmpError(f"{where}: '{key}' is {count}; expected 0 or more; {REMAKE}")
    return count
