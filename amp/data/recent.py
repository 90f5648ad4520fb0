"""Open files of the shards that were used most recently."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from amp.data.order import WINDOW

SHARDS = 3 * WINDOW // 2
"""Maximum number of shards that are open at a time: more than a window, since few batches contain samples of two."""

Value = TypeVar("Value")


class Recent(Generic[Value]):
    """The most recently used values of a function, at most `limit`. It is pickled without its values.

    Args:
        limit: Maximum number of values. Values that have a method `close` are closed when they are dropped.
    """

    def __init__(self, limit: int = SHARDS):
        self.limit = limit
        self._values: OrderedDict[Hashable, Value] = OrderedDict()

    def __reduce__(self):
        return Recent, (self.limit,)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value for a key, made if it isn't present."""
        if key not in self._values:
            self.put(key, make())
        self._values.move_to_end(key)
        return self._values[key]

    def put(self, key: Hashable, value: Value) -> None:
        """Adds a value that isn't present."""
        while len(self._values) >= self.limit:
            dropped = self._values.popitem(last=False)[1]
            getattr(dropped, "close", lambda: None)()
        self._values[key] = value
