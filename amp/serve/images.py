"""The content of images that a request contains or names."""

import base64
import binascii
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from PIL import Image

from amp.data.images.decode import opened
from amp.data.images.formats import UnreadableImageError
from amp.errors import shorten
from amp.search.image_states import is_packed
from amp.search.index import PhotoIndex
from amp.serve.fetch import fetch
from amp.serve.items import Item
from amp.serve.limits import FETCH_TOGETHER, PIXELS


class Images:
    """Gets the images of requests: photos of the index by their path in it, data URIs, base64, and URLs.

    Args:
        index: The index; None allows no paths.
        hosts: Hosts from which URLs are fetched; see `amp.serve.fetch.fetch`.
        limit: Maximum size of a fetched image in bytes.
    """

    def __init__(self, index: PhotoIndex | None, hosts: Collection[str] = (), limit: int = 32 << 20):
        self.index, self.hosts, self.limit = index, frozenset(hosts), limit
        self.numbers = {} if index is None else {name: number for number, name in enumerate(index.names)}

    def get_all(self, items: dict[int, Item]) -> tuple[dict[int, Path | bytes], dict[int, str]]:
        """Gets several images; those of other hosts at the same time.

        Returns:
            Images, and the reasons why others can't be used, both by the key of the item.
        """
        found: dict[int, Path | bytes] = {}
        reasons: dict[int, str] = {}

        def get(pair: tuple[int, Item]) -> None:
            try:
                found[pair[0]] = self.get(pair[1])
            except UnreadableImageError as error:
                reasons[pair[0]] = str(error)

        remote = [pair for pair in items.items() if _is_url(pair[1].value)]
        with ThreadPoolExecutor(FETCH_TOGETHER) as pool:
            list(pool.map(get, remote))
        for pair in items.items():
            if not _is_url(pair[1].value):
                get(pair)
        return found, reasons

    def get(self, item: Item) -> Path | bytes:
        """Gets one image, and checks its format and its number of pixels without decoding it.

        Returns:
            The path of a photo in the index, the content of an image file, or a packed state; see `amp.Reranker.pack`.

        Raises:
            UnreadableImageError: The image isn't there, or can't be used.
        """
        value = item.value
        if value in self.numbers:
            assert self.index is not None
            self.index.check_there(self.numbers[value])
            return self.index.path(self.numbers[value])
        if _is_url(value):
            try:
                content = fetch(value, self.hosts, self.limit)
            except OSError as error:
                raise UnreadableImageError(str(error)) from None
        else:
            content = _decoded(value)
        if not is_packed(content):  # the re-ranker checks packed states
            check(content)
        return content


def check(content: bytes) -> None:
    """Refuses images that no decoder reads, and images with more than `PIXELS` pixels.

    Raises:
        UnreadableImageError: The reason.
    """
    try:
        with opened(content) as image:
            width, height = image.size
    except UnreadableImageError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadableImageError(f"can't be read ({error})") from None
    if width * height > PIXELS:
        raise UnreadableImageError(f"{width} x {height} pixels, expected at most {PIXELS:,}; resize it")


def _is_url(value: str) -> bool:
    return value[:8].lower().startswith(("http://", "https://"))


def _decoded(value: str) -> bytes:
    """The content of a data URI or of base64 without a header."""
    header, comma, data = value.partition(",") if value[:5].lower() == "data:" else ("", "", value)
    with suppress(binascii.Error, ValueError):  # ValueError: letters that are not ASCII
        content = base64.b64decode(data, validate=True)
        if header.endswith(";base64") or (not comma and len(content) > 100):  # a short text is rather a path
            return content
    if comma:
        raise UnreadableImageError("a data URI that can't be read, expected data:image/jpeg;base64,...")
    raise UnreadableImageError(f"{shorten(value, 60)} is neither a photo of the index nor base64 of an image")
