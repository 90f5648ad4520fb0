"""The thread that all computation of the model runs in."""

import asyncio
import threading
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from amp.serve.limits import TOGETHER
from amp.serve.refusal import Refusal


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
        self._lock = threading.Lock()
        self._waiting: defaultdict[Callable, deque[tuple[Any, Future]]] = defaultdict(deque)

    async def run(self, function: Callable, *arguments) -> Any:
        """Calls function(*arguments) in the thread.

        Raises:
            Refusal: It takes too long. A call that has not begun is dropped.
        """
        return await self._result(self._pool.submit(function, *arguments))

    async def run_together(self, function: Callable[[list], list], item: Any) -> Any:
        """Calls function(items) for all items that wait for the same function, at most `TOGETHER` at once.

        Args:
            function: Returns one result per item, or an exception in place of a result.
            item: The item of this call.

        Returns:
            The result for the item.

        Raises:
            Refusal: See `run`.
        """
        future: Future = Future()
        with self._lock:
            self._waiting[function].append((item, future))
        self._pool.submit(self._call, function)  # finds nothing if an earlier call has taken the item
        return await self._result(future)

    def _call(self, function: Callable[[list], list]) -> None:
        waiting = self._waiting[function]
        taken: list[tuple[Any, Future]] = []
        with self._lock:
            while waiting and len(taken) < TOGETHER:
                item, future = waiting.popleft()
                if future.set_running_or_notify_cancel():
                    taken.append((item, future))
        if not taken:
            return
        try:
            results = function([item for item, _ in taken])
        except Exception as error:
            results = [error] * len(taken)
        for (_, future), result in zip(taken, results, strict=True):
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)

    async def _result(self, future: Future) -> Any:
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self.seconds)
        except TimeoutError:
            raise Refusal(504, f"no answer within {self.seconds:g} s; try again later, or send less") from None

    def close(self) -> None:
        """Drops calls that have not begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)
