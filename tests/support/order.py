"""The order of a whole epoch."""

import numpy as np

from amp.data.order import epoch_windows


def epoch_order(*arguments, **options) -> np.ndarray:
    """All windows of `epoch_windows` in one array."""
    return np.concatenate(list(epoch_windows(*arguments, **options)))
