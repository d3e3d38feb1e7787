"""`--device` of the commands."""

from __future__ import annotations

import torch


def device_of(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: torch knows none of that name, or it is not here.
    """
    try:
        return torch.empty(0, device=torch.device(name)).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch built without CUDA asserts
        raise ValueError(f"--device must be one that is there, but {name!r} is not; pass cpu") from error
