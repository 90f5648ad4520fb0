"""What a request may cost."""

from dataclasses import dataclass

PIXELS = 50_000_000
"""Largest image in a request: 50 megapixels. It is decoded to 150 MB."""
DOCUMENTS = 1_000
"""Largest number of candidates of a request."""
TOGETHER = 8
"""Largest number of searches in one batch."""
QUERY, WORDS, TRIPLETS = 2_000, 500, 32
"""Largest number of characters of a query and of a text of knowledge, and largest number of triplets."""
BODIES = 8
"""Number of bodies of the maximum size that are held in memory together."""
HEADER_SECONDS, BODY_SECONDS, ANSWER_SECONDS = 10, 30, 60
"""Time in which a client must send the header of a request and its body, and read a part of the answer."""
CONNECTIONS, STOP_SECONDS = 512, 10
"""Number of open connections, and time in which requests are answered after the server is stopped."""
FETCH_SECONDS, FETCH_TOGETHER = 10, 8
"""Time in which an image must be fetched from another host, and number of images fetched at the same time."""


@dataclass(frozen=True)
class Limits:
    """Limits that depend on the machine.

    Args:
        body: Largest body of a request in bytes. It also limits an image fetched from another host.
        queue: Number of requests that are handled or wait at the same time; further ones are refused with status 503.
        seconds: Time in which a request must be answered, including the time it waits for others.
    """

    body: int = 32 << 20
    queue: int = 64
    seconds: float = 60.0
