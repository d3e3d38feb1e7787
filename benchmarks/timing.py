"""What the benchmarks share: options, clocks, taking turns, and memory of a process of its own."""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


@dataclass(frozen=True)
class Settings:
    """Where and how large; ``small`` is a toy that shows that everything runs."""

    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 2
    clock: str = "wall"
    repeats: int = 7
    small: bool = False

    @property
    def slow_repeats(self) -> int:
        """Of what takes several times as long as the rest."""
        return max(1, self.repeats // 3)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device, getattr(torch, self.dtype))


def parser(description: str, repeats: str) -> argparse.ArgumentParser:
    """The options of every benchmark; ``repeats`` says what the number of them is of."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: processor time of this process, for a machine that does other things too; with --threads 1, since threads that "
        "wait for each other use the processor",
    )
    options.add_argument("--json", type=Path, help="write all numbers to this file")
    options.add_argument("--repeats", type=int, default=7, help=repeats)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--small", action="store_true", help="a toy in seconds; its ratios mean nothing")
    options.add_argument("--check", action="store_true", help="exit with 1 if anything fails")
    return options


def seconds(run: Callable[[], Any], settings: Settings) -> float:
    if settings.device != "cuda":
        clock = time.process_time if settings.clock == "cpu" else time.perf_counter
        start = clock()
        run()
        return clock() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000  # milliseconds


def least_seconds(
    section: str, runs: Mapping[str, Callable[[], Any]], settings: Settings, slow: tuple[str, ...] = ()
) -> dict[str, float]:
    """The least of several timings of each, taken in turns; what is ``slow`` is warmed up by its own first repeat."""
    for name, run in runs.items():
        if name not in slow:
            run()
    least = dict.fromkeys(runs, float("inf"))
    for repeat in range(settings.repeats):
        for name, run in runs.items():
            if name in slow and repeat >= settings.slow_repeats:
                continue
            taken = seconds(run, settings)
            least[name] = min(least[name], taken)
            progress(f"{section}, repeat {repeat + 1} of {settings.repeats}: {name}: {taken:.4f} s")
    return least


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def in_own_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """Calls a function in a process that is forked for it while this one has not done anything yet."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as process:
        return process.submit(function, *arguments).result()


def peak_memory(settings: Settings) -> float:
    """MiB, of this process: `torch.cuda.max_memory_allocated`, or the largest resident set (getrusage)."""
    if settings.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 2**10 if sys.platform == "linux" else 1  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def memory_of_what(settings: Settings) -> str:
    return "allocated on the GPU" if settings.device == "cuda" else "resident, libraries included"


def environment(settings: Settings) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if settings.device == "cuda" else platform.machine()
    return {**asdict(settings), "torch": torch.__version__, "python": platform.python_version(), "machine": device}


def write_json(path: Path | None, values: Mapping[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(values, indent=2) + "\n")
