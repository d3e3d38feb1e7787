"""The journal of a pseudo-labelling run: what has been decoded, so that a killed run goes on and shards find each other.

A folder with one file per process, `part-1-of-4.jsonl`. Line 1 holds the settings that decide what is decoded, every other line one
batch: ``{"batch": 7, "utterances": [{"index": 3, "hypotheses": [...]}, ...]}``. Batches are numbered over the whole
manifest, so parts of any number of shards join.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # not on Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]

Decoded = dict[int, dict[str, Any]]  # index in the manifest -> what the journal says of the utterance


class Journal:
    """The parts of one run.

    Args:
        folder: where they are.
        settings: what decides the result, JSON values; parts of other settings are refused.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self.settings = folder, dict(settings)

    def read(self) -> tuple[Decoded, set[int]]:
        """Everything that was decoded: utterances, and the numbers of finished batches.

        Raises:
            ValueError: a part was decoded with other settings; names what differs.
        """
        decoded: Decoded = {}
        batches: set[int] = set()
        for path in self._parts():
            lines = _complete_lines(path)
            if not lines:
                continue
            self._check(path, lines[0])
            for line in lines[1:]:
                try:
                    batches.add(line["batch"])
                    decoded |= {utterance["index"]: utterance for utterance in line["utterances"]}
                except (KeyError, TypeError) as error:
                    raise ValueError(
                        f"{path} is damaged: a line must hold a batch and its utterances, but one does not; remove the file to decode "
                        "them again"
                    ) from error
        return decoded, batches

    def drop_foreign(self) -> None:
        """Removes parts that were decoded with other settings; the others stay."""
        for path in self._parts():
            lines = _complete_lines(path)
            if lines and lines[0].get("settings") != self.settings:
                path.unlink()

    @contextmanager
    def append(self, shard: int, num_shards: int) -> Iterator[Writer]:
        """Opens a shard's part to add to it; a line that a kill cut off is removed.

        Raises:
            RuntimeError: another process writes it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"part-{shard}-of-{num_shards}.jsonl"
        with path.open("a+b") as stream:
            if fcntl is not None:
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise RuntimeError(
                        f"{path} must be written by one process, but another one is at it; wait for it, or give each its own --shard"
                    ) from error
            _cut_incomplete_line(stream)
            writer = Writer(stream)
            if stream.seek(0, os.SEEK_END) == 0:
                writer.write({"settings": self.settings})
            yield writer

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("part-*-of-*.jsonl"))

    def _check(self, path: Path, header: Mapping[str, Any]) -> None:
        found = header.get("settings")
        if not isinstance(found, Mapping):
            raise ValueError(f"{path} is no journal of pseudo-labels: it has no settings on line 1; move it away")
        if found != self.settings:
            names = sorted(name for name in {*found, *self.settings} if found.get(name) != self.settings.get(name))
            raise ValueError(
                f"{path} must be of this run, but was decoded with another {', '.join(names)}; pass --overwrite to decode again, or "
                "another output folder"
            )


class Writer:
    """Adds lines to a part; each is on disk when `write` returns."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def write(self, line: Mapping[str, Any]) -> None:
        self._stream.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())


def _complete_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a part up to its last newline.

    Raises:
        ValueError: one of them is no JSON object.
    """
    *lines, _ = path.read_bytes().split(b"\n")
    parsed = []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise ValueError(
                f"{path}:{number}: a line of the journal must be a JSON object, but is not; remove the file"
            )
        parsed.append(value)
    return parsed


def _cut_incomplete_line(stream: BinaryIO) -> None:
    stream.seek(0)
    content = stream.read()
    stream.truncate(content.rfind(b"\n") + 1)
