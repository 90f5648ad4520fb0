"""The thread that all computation of the model runs in."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from amp.serve.refusal import Refusal

Result = TypeVar("Result")


class ModelThread:
    """Runs functions one after another in one thread.

    Requests that compute at the same time would only slow each other down, because PyTorch already uses all cores, and
    would need memory for several batches at once.

    Args:
        seconds: Time in which a call must be finished, including the time it waits for others.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="model")

    async def run(self, function: Callable[..., Result], *arguments) -> Result:
        """Calls function(*arguments) in the thread.

        Raises:
            Refusal: It takes too long. A call that has not begun is dropped.
        """
        future = asyncio.wrap_future(self._pool.submit(function, *arguments))
        try:
            return await asyncio.wait_for(future, self.seconds)
        except TimeoutError:
            raise Refusal(504, f"no answer within {self.seconds:g} s; try again later, or send less") from None

    def close(self) -> None:
        """Drops calls that have not begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)
