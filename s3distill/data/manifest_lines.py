"""The lines of manifests, label files and dictionaries: parsed once here, with every fault listed.

`manifest.py` raises the first fault when it reads and collects all of them when it checks.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

FILE_REMEDY = "write it with `s3distill manifest DIR --out DIR`"


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: where, the rule, what came, and the remedy."""

    path: str
    line: int | None
    rule: str
    found: str
    remedy: str

    def __str__(self) -> str:
        place = self.path if self.line is None else f"{self.path}:{self.line}"
        return f"{place}: {self.rule}, but {self.found}; {self.remedy}"


@dataclass(frozen=True)
class Manifest:
    """A wav2vec manifest.

    Args:
        path: the `.tsv` file.
        root: the folder that the entries are relative to, absolute.
        entries: relative path and number of samples of each utterance.
        lines: line in the file of each entry, from 1 (2, 3, ... where no line was skipped).
        num_lines: lines below the root line, faulty ones included: what the label files must have.
    """

    path: Path
    root: Path
    entries: list[tuple[str, int]]
    lines: list[int] = field(default_factory=list, compare=False, repr=False)
    num_lines: int = field(default=0, compare=False, repr=False)

    def audio_path(self, index: int) -> Path:
        """The audio file of an entry."""
        return self.root / self.entries[index][0]

    @property
    def num_samples(self) -> int:
        return sum(num_samples for _, num_samples in self.entries)


def read_lines(path: str | os.PathLike[str], what: str, remedy: str = FILE_REMEDY) -> tuple[list[str], list[Fault]]:
    """The lines of a UTF-8 text file without their newlines, or the fault that keeps it from being read.

    Only newlines end a line: `str.splitlines` also splits at U+0085 and others, which puts later lines out of step.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        return [], [
            Fault(str(path), None, f"the {what} must be a readable file", f"reading it gave {error.strerror!r}", remedy)
        ]
    except UnicodeDecodeError as error:
        found = f"byte {error.start} is not UTF-8"
        return [], [Fault(str(path), None, f"the {what} must be UTF-8 text", found, "convert it, as with iconv")]
    if text.startswith("\ufeff"):
        found = "it starts with a byte order mark, which would belong to its first word"
        remedy = "save it as UTF-8 without one"
        return [], [Fault(str(path), None, f"the {what} must be plain UTF-8", found, remedy)]
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return lines, []


def parse_manifest(path: str | os.PathLike[str]) -> tuple[Manifest, list[Fault]]:
    """Parses a manifest; entries of faulty lines are left out of it."""
    path = Path(path)
    lines, faults = read_lines(path, "manifest")
    root_line = lines[0].strip() if lines else ""
    if not faults and not root_line:
        found = "it is empty" if lines else "the file is empty"
        faults.append(Fault(str(path), 1, "line 1 must be the root folder of the audio", found, FILE_REMEDY))
    elif "\t" in root_line:
        rule, remedy = "line 1 must be the root folder of the audio", "put the root, or `.` for this folder, above it"
        faults.append(Fault(str(path), 1, rule, f"it is {root_line!r}", remedy))
    manifest = Manifest(path, Path(os.path.abspath(path.parent / root_line)), [], num_lines=max(0, len(lines) - 1))
    first_lines: dict[str, int] = {}
    for number, line in enumerate(lines[1:], start=2):
        fields = line.split("\t")
        if len(fields) != 2 or not fields[0].strip() or not fields[1].strip().isdecimal() or int(fields[1]) < 1:
            rule = "a line must be `path<TAB>number of samples`"
            found = f"it is {line!r}" if line.strip() else "it is empty"
            faults.append(Fault(str(path), number, rule, found, "correct or remove the line (and its label lines)"))
            continue
        if fields[0] in first_lines:
            rule, found = "an audio file must be listed once", f"{fields[0]!r} is on line {first_lines[fields[0]]} too"
            faults.append(Fault(str(path), number, rule, found, "remove one of the lines (and its label lines)"))
        first_lines.setdefault(fields[0], number)
        manifest.entries.append((fields[0], int(fields[1])))
        manifest.lines.append(number)
    if not faults and not manifest.entries:
        rule, found = "a manifest must list at least one audio file", "it has none below its root"
        faults.append(Fault(str(path), 1, rule, found, FILE_REMEDY))
    return manifest, faults


def parse_dictionary(path: str | os.PathLike[str]) -> tuple[dict[str, int], list[Fault]]:
    """Parses a fairseq dictionary, `symbol count` a line; faulty lines are left out.

    Returns:
        symbol -> count in the order of the file (index in fairseq = position + 4 special symbols), and the faults.
    """
    lines, faults = read_lines(path, "dictionary")
    counts: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        symbol, _, count = line.rstrip().removesuffix(" #fairseq:overwrite").rpartition(" ")
        if not symbol or not count.isdecimal():
            rule, remedy = "a line must be `symbol count`", "correct the line"
            faults.append(Fault(str(path), number, rule, f"it is {line!r}", remedy))
        elif symbol in counts:
            rule, found = "a symbol must stand once in a dictionary", f"{symbol!r} is there before"
            faults.append(Fault(str(path), number, rule, found, "remove one of the lines"))
        else:
            counts[symbol] = int(count)
    if not faults and not counts:
        faults.append(Fault(str(path), 1, "a dictionary must hold at least one symbol", "it is empty", FILE_REMEDY))
    return counts, faults
