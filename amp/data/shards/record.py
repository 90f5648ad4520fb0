"""The record of a sample, `KEY.json`::

    {"schema": 1, "key": KEY, "image_id": int | str, "filename": path under the images folder, "split": "train",
     "captions": [{"id": int | str, "text": str,
                   "triplets": [{"subject", "action", "object", "kind"}], "states": [str]}]}

A caption may also have `sources` or `empty` (`amp.knowledge.schema.parse_origin`), and `foils` (`parse_foils`).
"""

from __future__ import annotations

import json
from typing import Any

from amp.data.captions.base import CaptionedImage
from amp.errors import AmpError, shorten
from amp.json_text import check_id, check_text, parse_json, value_of

RECORD_SCHEMA = 1
NO_KNOWLEDGE = '{"triplets":[],"states":[]}'
REMAKE = "make the shards again with amp make_shards"
"""Next step in error messages about damaged shards."""


def record_bytes(key: str, image: CaptionedImage) -> bytes:
    """The bytes of a sample's record."""
    head = {
        "schema": RECORD_SCHEMA,
        "key": key,
        "image_id": image.id,
        "filename": image.path,
        "split": image.split,
    }
    captions = []
    for caption in image.captions:
        # Knowledge is already JSON text, so the texts are joined.
        own = json.dumps({"id": caption.id, "text": caption.text}, ensure_ascii=False, separators=(",", ":"))
        captions.append(f"{own[:-1]},{(caption.knowledge or NO_KNOWLEDGE)[1:]}")
    text = json.dumps(head, ensure_ascii=False, separators=(",", ":"))
    return f'{text[:-1]},"captions":[{",".join(captions)}]}}'.encode()


def parse_record(content: bytes, key: str | None, where: str) -> dict[str, Any]:
    """Parses and validates a sample's record, except its knowledge (see `amp.knowledge.schema.parse_knowledge`).

    Args:
        content: The bytes of the member.
        key: Key of the sample, from the member's name; None if the sample is read by an index.
        where: Start of error messages.

    Raises:
        AmpError: The record isn't JSON, has another schema or key, or has an invalid value.
    """
    try:
        record = parse_json(content)
    except ValueError as error:
        raise AmpError(f"{where}: not JSON ({error}); expected a record; {REMAKE}") from None
    if value_of(record, "schema", int, where, REMAKE) != RECORD_SCHEMA:
        raise AmpError(f"{where}: 'schema' is {record['schema']}; this release reads schema {RECORD_SCHEMA}; {REMAKE}")
    if value_of(record, "key", str, where, REMAKE) != key and key is not None:
        raise AmpError(f"{where}: 'key' is {shorten(record['key'])}; expected {shorten(key)}; {REMAKE}")
    if not value_of(record, "captions", list, where, REMAKE):
        raise AmpError(f"{where}: 'captions' is empty; expected at least one caption; {REMAKE}")
    for number, caption in enumerate(record["captions"]):
        here = f"{where}: captions[{number}]"
        check_text(value_of(caption, "text", str, here, REMAKE), f"{here}: 'text'", REMAKE)
        check_id(caption.get("id", number), f"{here}: 'id'", REMAKE)
    check_id(record.get("image_id", ""), f"{where}: 'image_id'", REMAKE)
    for name in ("filename", "split"):
        check_text(record.get(name, ""), f"{where}: '{name}'", REMAKE)
    return record
