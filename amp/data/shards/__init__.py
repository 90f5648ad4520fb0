"""The shard format, and readers of shards.

A folder of shards contains WebDataset tar files (`train-000000.tar` and so on), an index of each
(`train-000000.index.npy`) and `manifest.json`. A sample is two members of a tar file: `KEY.jpg` (or another image
extension in lower case) and its record `KEY.json` (`amp.data.shards.record`).

Tar files of other tools can be used as they are. Their records are in a file of their own (`NAME.records.jsonl`), and
the manifest may be in another folder.

Any WebDataset reader can read these tar files. Training needs more than a sequential reader: an order that is a pure
function of (seed, epoch), and resuming without reading the skipped samples. So samples are read by number, with the
shard's index (`amp.data.shards.index`).
"""

from amp.data.shards.manifest import MANIFEST_NAME, ShardInfo, ShardManifest
from amp.data.shards.reader import IMAGE_EXTENSIONS, MAX_MEMBER_BYTES, ShardReader

__all__ = ["IMAGE_EXTENSIONS", "MANIFEST_NAME", "MAX_MEMBER_BYTES", "ShardInfo", "ShardManifest", "ShardReader"]
