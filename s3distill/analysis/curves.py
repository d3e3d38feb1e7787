"""Training curves out of fairseq's log: every figure that was logged, over the number of updates."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# `[2026-01-31 12:00:00,000][train_inner][INFO] - {...}` (hydra), `2026-... | INFO | train_inner | {...}` (command line)
_TAG = re.compile(r"\[(train_inner|train|valid)\]|\|\s*(train_inner|train|valid)\s*\|")


@dataclass(frozen=True)
class Curve:
    """One figure over the updates: ``values[i]`` was logged at ``updates[i]``; updates rise strictly."""

    updates: list[int]
    values: list[float]


@dataclass
class TrainingCurves:
    """The figures of a run.

    Attributes:
        train: by name, as logged every ``common.log_interval`` updates (at the ends of epochs in runs shorter than that).
        valid: by name, without fairseq's ``valid_`` in front, as logged at each validation.
        source: the log that they were read from.
    """

    train: dict[str, Curve] = field(default_factory=dict)
    valid: dict[str, Curve] = field(default_factory=dict)
    source: str = ""


def read_curves(path: str | os.PathLike[str]) -> TrainingCurves:
    """Reads a log that fairseq wrote with ``common.log_format=json`` (``hydra_train.log``, or the saved output).

    Other lines are passed over. Of an update that was logged twice, because the run was killed and resumed, the last one
    counts; figures that are no numbers are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no line of it is a JSON progress line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"training log {path} does not exist; fairseq-hydra-train writes hydra_train.log into its run folder"
        )
    found: dict[str, dict[str, dict[int, float]]] = {"train": {}, "epoch": {}, "valid": {}}
    with path.open(encoding="utf-8", errors="replace") as stream:
        for tag, stats in _progress_lines(stream):
            _keep(found, tag, stats)
    found["train"] = found["train"] or found["epoch"]  # a run shorter than log_interval has the ends of its epochs only
    if not found["train"] and not found["valid"]:
        raise ValueError(
            f"{path} has no JSON progress line; train with common.log_format=json (++common.log_format=json)"
        )
    return TrainingCurves(
        *({name: _curve(points) for name, points in found[kind].items()} for kind in ("train", "valid")), str(path)
    )


def _progress_lines(lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for line in lines:
        start = line.find("{")
        if start < 0:
            continue
        try:
            stats = json.loads(line[start:])
        except json.JSONDecodeError:  # a config dump, or a line that was cut by a kill
            continue
        if not isinstance(stats, dict):
            continue
        tag = _TAG.search(line[:start])
        if tag:
            yield tag.group(1) or tag.group(2), stats
        elif "valid_num_updates" in stats:
            yield "valid", stats
        elif "num_updates" in stats:
            yield "train_inner", stats


def _keep(found: dict[str, dict[str, dict[int, float]]], tag: str, stats: dict[str, Any]) -> None:
    """Adds one line's figures; fairseq logs them as strings."""
    kind, prefix = {"valid": ("valid", "valid_"), "train": ("epoch", "train_"), "train_inner": ("train", "")}[tag]
    update = _number(stats.get(f"{prefix}num_updates"))
    if update is None:
        return
    for name, value in stats.items():
        number = _number(value)
        if number is not None:
            found[kind].setdefault(name.removeprefix(prefix), {})[int(update)] = number


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _curve(points: dict[int, float]) -> Curve:
    updates = sorted(points)
    return Curve(updates, [points[u] for u in updates])
