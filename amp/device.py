"""The device that a model runs on."""

import torch

from amp.errors import AmpError


def usable_device(device: str | torch.device | None = None) -> torch.device:
    """Returns the named device after testing that it works. The default is a GPU if there is one, else the CPU.

    Raises:
        AmpError: PyTorch doesn't know the device, or this machine doesn't have it.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        there = ", ".join(["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))])
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise AmpError(f"device is {str(device)!r}, expected one of {there} ({reason})") from None
    return found
