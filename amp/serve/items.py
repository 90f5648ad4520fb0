"""Reads the query and the documents of a rerank request, in all forms that Cohere, Jina and vLLM use for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from amp.errors import shorten
from amp.json_text import is_unicode
from amp.serve.limits import DOCUMENTS, QUERY
from amp.serve.refusal import Refusal

FORMS = 'a text, {"text": ...}, {"image": ...} or {"image_url": {"url": ...}}'


@dataclass(frozen=True)
class Item:
    """A query or a document.

    Attributes:
        kind: `text`, or `image` for an image or a reference to one.
        value: The text; or a data URI, base64, a URL, or the path of a photo in the index.
    """

    kind: Literal["text", "image"]
    value: str


def read_query(value: Any) -> Item:
    """Reads a query.

    Raises:
        Refusal: It has another form, or is empty or too long.
    """
    item = _read(value, "query", "text")
    if item.kind == "text" and not item.value.strip():
        raise Refusal(400, "query is empty, expected a text or an image")
    if item.kind == "text" and len(item.value) > QUERY:
        raise Refusal(400, f"query has {len(item.value):,} characters, expected at most {QUERY:,}")
    return item


def read_documents(value: Any, query: Item) -> list[Item]:
    """Reads the documents. A document that is only a string is an image for a text query, and a text for an image.

    Raises:
        Refusal: One has another form, there is none, or there are too many.
    """
    if isinstance(value, dict) and isinstance(value.get("content"), list):  # vLLM's form of several documents
        value = value["content"]
    if not isinstance(value, list) or not value:
        raise Refusal(400, f"documents is {shorten(value, 40)}, expected a list with at least one document")
    if len(value) > DOCUMENTS:
        raise Refusal(400, f"documents has {len(value):,} entries, expected at most {DOCUMENTS:,}")
    bare: Literal["text", "image"] = "image" if query.kind == "text" else "text"
    return [_read(one, f"documents[{number}]", bare) for number, one in enumerate(value)]


def read_image(value: Any, where: str) -> Item:
    """Reads one image.

    Raises:
        Refusal: It has another form, or is a text.
    """
    item = _read(value, where, "image")
    if item.kind != "image":
        raise Refusal(400, f"{where} is a text, expected an image")
    return item


def unfit(items: Sequence[Item], query: Item) -> dict[int, str]:
    """Why documents of the query's own kind and empty texts can't be ranked, by their index."""
    names = {"text": "a text", "image": "an image"}
    wanted = "image" if query.kind == "text" else "text"
    reason = f"is {names[query.kind]}, expected {names[wanted]}, because the query is {names[query.kind]}"
    empty = {index: "is empty" for index, item in enumerate(items) if item.kind == "text" and not item.value.strip()}
    return empty | {index: reason for index, item in enumerate(items) if item.kind != wanted}


def _read(value: Any, where: str, bare: Literal["text", "image"]) -> Item:
    item = _item(value, where, bare)
    if not is_unicode(item.value):
        raise Refusal(400, f"{where} is not valid Unicode, expected a text without single surrogates")
    return item


def _item(value: Any, where: str, bare: Literal["text", "image"]) -> Item:
    if isinstance(value, str):
        return Item(bare, value)
    if isinstance(value, dict):
        if isinstance(parts := value.get("content"), list) and len(parts) == 1:
            return _item(parts[0], f"{where}: content[0]", bare)
        image = value.get("image", value.get("image_url"))
        if isinstance(image, dict):
            image = image.get("url")
        if isinstance(image, str):
            return Item("image", image)
        if isinstance(text := value.get("text"), str):
            return Item("text", text)
    raise Refusal(400, f"{where} is {shorten(value, 60)}, expected {FORMS}")
