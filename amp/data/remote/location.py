"""Locations of remote files: URLs whose credentials are never shown."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from amp.errors import AmpError, require, without_secrets

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
# What each kind of URL needs in addition to fsspec.
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
# Arguments of `cat_file` and `info`. Otherwise huggingface_hub reads 5 MB more than the range, and lists the whole
# folder for the size of one file.
READ_OPTIONS: dict[str, dict[str, Any]] = {"hf": {"cache_type": "none"}}
INFO_OPTIONS: dict[str, dict[str, Any]] = {"hf": {"expand_info": True, "refresh": True}}
CONNECT_SECONDS, READ_SECONDS = 30, 60
_systems: dict[tuple[int, str], Any] = {}


def is_url(text: str) -> bool:
    """Whether a text is a URL rather than a local path."""
    return _URL.match(text) is not None


def public_url(url: str) -> str:
    """A URL without its user name, password and query string."""
    head, mark, _ = url.partition("?")
    scheme, slashes, rest = head.partition("://")
    host, slash, path = rest.partition("/")
    if "@" in host:
        host = f"***@{host.rpartition('@')[2]}"
    return without_secrets(f"{scheme}{slashes}{host}{slash}{path}") + ("?***" if mark else "")


@dataclass(frozen=True)
class Location:
    """A remote file or folder, with the parts of `pathlib.Path` that readers of shards use.

    `str()` hides passwords and the query string, so that messages can contain a location.

    Attributes:
        url: URL without its query string and without a final slash.
        query: Query string with its question mark, such as the token of a signed URL; it is added to every file.
    """

    url: str
    query: str = ""

    @classmethod
    def parse(cls, text: str) -> Location:
        """The location of a URL.

        Raises:
            AmpError: The URL contains a password that its kind of server doesn't use.
        """
        url, mark, query = text.partition("?")
        location = cls(url.rstrip("/"), mark + query)
        if location.scheme not in ("http", "https") and "@" in url.partition("://")[2].partition("/")[0]:
            raise AmpError(
                f"{location}: a user name in a {location.scheme}:// URL, which isn't used; expected a bucket; set the "
                "credentials in the environment (docs/data.md) and remove them from the URL"
            )
        return location

    @property
    def scheme(self) -> str:
        return self.url.partition("://")[0].lower()

    @property
    def name(self) -> str:
        rest = self.url.partition("://")[2]
        return rest.rpartition("/")[2] if "/" in rest else rest.rpartition("@")[2]

    @property
    def parent(self) -> Location:
        return Location(self.url.rpartition("/")[0], self.query)

    @property
    def full(self) -> str:
        """The URL with its credentials, for fsspec only."""
        return self.url + self.query

    def __truediv__(self, name: str) -> Location:
        return Location(f"{self.url}/{name}", self.query)

    def with_name(self, name: str) -> Location:
        return self.parent / name

    def __str__(self) -> str:
        return public_url(self.full)

    def __repr__(self) -> str:
        return f"Location({str(self)!r})"


def file_system(location: Location) -> Any:
    """The fsspec file system of a location: one per process, since connections don't survive a fork.

    Retries of the libraries are switched off where they can be, because `amp.data.remote.fetch` retries and counts.

    Raises:
        AmpError: A package is missing, or the kind of URL is unknown.
    """
    key = os.getpid(), location.scheme
    if key in _systems:
        return _systems[key]
    scheme, who = location.scheme, f"reading {location.scheme}:// shards"
    fsspec = require("fsspec", who)
    if scheme in PACKAGES:
        require(PACKAGES[scheme], who)
    options: dict[str, Any] = {}
    if scheme in ("http", "https"):
        timeout = require("aiohttp", who).ClientTimeout(
            total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS
        )
        options = {
            "encoded": True,  # quoting a signed URL again would change what is signed
            "client_kwargs": {"timeout": timeout, "trust_env": True},  # ~/.netrc and proxies
            "get_client": _http_client,
            "headers": {"Accept-Encoding": "identity"},
        }
    elif scheme == "s3":
        retries = {"total_max_attempts": 1, "mode": "standard"}
        options["config_kwargs"] = {
            "retries": retries,
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": READ_SECONDS,
            "max_pool_connections": 32,
        }
    try:
        if scheme in ("gs", "gcs"):
            # fsspec would choose a subclass that first looks up the bucket's type, again for each read if that fails.
            system = require("gcsfs", who).core.GCSFileSystem()
        else:
            system = fsspec.filesystem(scheme, **options)
    except ImportError as error:
        raise AmpError(f"{location}: {who} needs another package ({error})") from None
    except ValueError as error:
        raise AmpError(f"{location}: {error}; expected s3://, gs://, https:// or hf://") from None
    if scheme == "s3":
        system.retries = 1
    return _systems.setdefault(key, system)


async def _http_client(**options: Any) -> Any:
    session = require("aiohttp", "reading http:// shards").ClientSession(**options)
    session._retry_connection = False  # repeats a request once without saying so
    return session
