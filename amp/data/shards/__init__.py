"""Folders of shards: what they look like, and how to read them.

A folder holds WebDataset tars, `train-000000.tar` and so on, and `manifest.json`. A sample is two members of a tar:
`KEY.jpg` (or another image extension in lower case) and its record `KEY.json` (`amp.data.shards.record`).

Any WebDataset reader reads these tars. Training needs more than a sequential reader gives: an order that is a pure
function of (seed, epoch) and a resume that skips without decoding. So the headers of a shard are indexed once, after
which its samples are read by number.
"""

from amp.data.shards.manifest import MANIFEST_NAME, ShardInfo, ShardManifest
from amp.data.shards.reader import IMAGE_EXTENSIONS, MAX_MEMBER_BYTES, ShardReader

__all__ = ["IMAGE_EXTENSIONS", "MANIFEST_NAME", "MAX_MEMBER_BYTES", "ShardInfo", "ShardManifest", "ShardReader"]
