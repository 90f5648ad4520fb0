"""Fetches images from hosts that the user has allowed.

Without `--allow_hosts`, nothing is fetched. A host's name is resolved once, all its addresses must be public, and the
connection goes to the address that was checked, so a name server can't direct the request into the local network.
"""

import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection
from contextlib import closing
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection  # noqa: TID251
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

from amp.errors import shorten
from amp.serve.limits import FETCH_SECONDS

_PORTS = {"http": 80, "https": 443}
_REDIRECTS = 3


class FetchError(OSError):
    """An image that can't be fetched. The message is the reason, written for the client."""


def fetch(url: str, hosts: Collection[str], limit: int, seconds: float = FETCH_SECONDS, resolve: Any = None) -> bytes:
    """Fetches a URL. Redirects are followed only to the same host.

    Args:
        url: URL with `http` or `https`.
        hosts: Allowed hosts: names or addresses, each with its port unless it is the usual one. An address may be
            private, because it is what the user has written.
        limit: Maximum number of bytes.
        seconds: Maximum time, including redirects.
        resolve: Replacement for `socket.getaddrinfo`.

    Raises:
        FetchError: The host isn't allowed, or the image can't be fetched within the limits.
    """
    end = time.monotonic() + seconds
    first = host_of(url)
    for _ in range(_REDIRECTS + 1):
        place, host = urlsplit(url), host_of(url)
        if host not in hosts:
            raise FetchError(f"{host} may not be contacted, expected a host of --allow_hosts")
        if host != first:
            raise FetchError(f"{first} redirects to another host, {host}")
        try:
            content, target = _get(place, _address(place, resolve or socket.getaddrinfo), limit, end)
        except FetchError:
            raise
        except (OSError, HTTPException, ValueError) as error:
            raise FetchError(f"{host} can't be read ({getattr(error, 'strerror', None) or error})") from None
        if target is None:
            return content
        url = urljoin(url, target)
    raise FetchError(f"{first} redirects more than {_REDIRECTS} times")


def host_of(url: str) -> str:
    """Host of a URL as `--allow_hosts` names it: in lower case, with the port unless it is the usual one.

    Raises:
        FetchError: It is not a URL with `http` or `https` and a host, or it contains a password.
    """
    try:
        place = urlsplit(url)
        port, name = place.port, place.hostname
    except ValueError:
        name, port, place = None, None, SplitResult("", "", "", "", "")
    if place.scheme not in _PORTS or not name or place.username is not None or not url.isprintable() or " " in url:
        raise FetchError(f"{shorten(url, 60)} is not a URL with http or https and without a password")
    name = f"[{name}]" if ":" in name else name
    return name if port in (None, _PORTS[place.scheme]) else f"{name}:{port}"


def is_host(text: str) -> bool:
    """Whether a text is a host as `host_of` names it."""
    if "*" in text:  # patterns are not supported
        return False
    try:
        return text in (host_of(f"http://{text}"), host_of(f"https://{text}"))
    except FetchError:
        return False


def _address(place: SplitResult, resolve: Callable) -> str:
    """The address to connect to."""
    name = place.hostname or ""
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        pass
    found = {entry[4][0] for entry in resolve(name, place.port or _PORTS[place.scheme], type=socket.SOCK_STREAM)}
    private = sorted(one for one in found if not _is_public(one))
    if private or not found:
        raise FetchError(
            f"{name} has the address {', '.join(private) or 'none'}, expected public addresses; to fetch from a "
            "private address, give the address itself in --allow_hosts and in the URL"
        )
    return min(found, key=lambda one: (":" in one, one))  # IPv4 first, which more networks have


def _is_public(address: str) -> bool:
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour  # the IPv4 address that packets really go to
        found = inner or found
    return found.is_global


def _get(place: SplitResult, address: str, limit: int, end: float) -> tuple[bytes, str | None]:
    """Content of a URL; or the target of a redirect."""
    port = place.port or _PORTS[place.scheme]
    kind = HTTPSConnection if place.scheme == "https" else HTTPConnection
    connection = kind(place.hostname or "", port)
    with socket.create_connection((address, port), _left(end)) as plain, closing(connection):
        # A server that sends one byte at a time never exceeds a time limit of the socket, so a timer ends everything.
        timer = threading.Timer(_left(end), socket.socket.shutdown, (plain, socket.SHUT_RDWR))
        timer.daemon = True
        timer.start()
        try:
            connection.sock = plain
            if place.scheme == "https":
                context = ssl.create_default_context()
                connection.sock = context.wrap_socket(plain, server_hostname=place.hostname)
            path = (place.path or "/") + (f"?{place.query}" if place.query else "")
            connection.request("GET", path, headers={"Accept": "image/*", "User-Agent": "amp serve"})
            return _read(connection.getresponse(), limit)
        finally:
            timer.cancel()
            _left(end)


def _read(reply: HTTPResponse, limit: int) -> tuple[bytes, str | None]:
    if reply.status in (301, 302, 303, 307, 308) and (target := reply.getheader("Location")):
        return b"", target
    if reply.status != 200:
        raise FetchError(f"the server answered with status {reply.status}, expected 200")
    content = reply.read(limit + 1)
    if len(content) > limit:
        raise FetchError(f"more than {limit:,} bytes, expected at most {limit:,}")
    return content, None


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise FetchError("took too long")
    return left
