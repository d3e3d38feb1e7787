"""Wall-clock time of a call on a CPU or GPU, with a given number of CPU threads."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

MIN_CALL_S = 1e-3  # shorter calls are repeated so often, and their mean is taken: the clock itself takes microseconds


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds that one call takes, with what it started on ``device``."""
    first = _seconds(call, device, 1)
    number = int(MIN_CALL_S / max(first, 1e-7))
    return first if number <= 1 else min(first, _seconds(call, device, number))


def _seconds(call: Callable[[], Any], device: torch.device, number: int) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(number):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / number


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def threads(number: int | None) -> Iterator[None]:
    """torch with so many CPU threads; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
