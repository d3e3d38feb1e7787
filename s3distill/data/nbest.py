"""The n-best file of a split, `SPLIT.nbest.jsonl`: what a recogniser heard in each utterance, several guesses each.

Line i belongs to line i + 1 of `SPLIT.tsv` and is one JSON object, with no hypotheses where decoding left the utterance out (too
short) or heard nothing in it that training could use:

    {"audio": "train/1.flac", "hypotheses": [{"units": "H I |", "score": -0.31, "confidence": 0.97, "weight": 0.81}, ...]}

``weight`` is what a hypothesis counts among those of its utterance, see `NbestEntry.weights`; files of others may lack it.
Written by `s3distill pseudo-label` and by decoding, read by training with ``task.nbest=true``.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from s3distill.data.manifest import MAX_LISTED_FAULTS, PathLike, write_lines
from s3distill.data.manifest_lines import Fault, Manifest, read_lines

ENDING = "nbest.jsonl"

_REMEDY = "write manifest and n-best file together, with `s3distill pseudo-label`"
_FIELDS = ("units", "score", "confidence")


@dataclass(frozen=True)
class Hypothesis:
    """One guess of what was said.

    Args:
        units: symbols of the dictionary with spaces between them, as a label line has them.
        score: log-probability, natural logarithm; with a language model the score of the search.
        confidence: mean posterior of the symbols at their frames, in [0, 1].
    """

    units: str
    score: float
    confidence: float


@dataclass(frozen=True)
class NbestEntry:
    """One utterance: its file as the manifest has it, and its hypotheses, best first; none where nothing could be heard."""

    audio: str
    hypotheses: tuple[Hypothesis, ...]

    @property
    def weights(self) -> list[float]:
        """p_k = exp(score_k) / sum_j exp(score_j), the share of each hypothesis; training with ``seq_kd=uniform`` takes it as it is."""
        best = max((h.score for h in self.hypotheses), default=0.0)
        shares = [math.exp(h.score - best) for h in self.hypotheses]
        return [share / sum(shares) for share in shares]


def nbest_path(manifest_path: PathLike) -> Path:
    """The n-best file that lies beside a manifest."""
    return Path(manifest_path).with_suffix(f".{ENDING}")


def write_nbest(path: PathLike, entries: Iterable[NbestEntry]) -> None:
    """Writes an n-best file, whole or not at all."""
    write_lines(path, (nbest_line(entry) for entry in entries))


def nbest_line(entry: NbestEntry) -> str:
    """An utterance as its line of the file."""
    pairs = zip(entry.hypotheses, entry.weights, strict=True)
    hypotheses = [{**asdict(hypothesis), "weight": round(weight, 6)} for hypothesis, weight in pairs]
    return json.dumps({"audio": entry.audio, "hypotheses": hypotheses}, ensure_ascii=False)


def read_nbest(path: PathLike, manifest: Manifest, symbols: Collection[str] | None = None) -> list[NbestEntry]:
    """The hypotheses of every utterance of a manifest, checked.

    Args:
        path: the n-best file.
        manifest: the manifest that it belongs to.
        symbols: what units may be; None allows every symbol.
    Raises:
        ValueError: the first faults with file, line, rule and remedy: another number of lines, no JSON, another audio file, an
            empty hypothesis, one twice, a unit that is no symbol, a score or confidence that is no such number, hypotheses
            that are not best first, or a weight that does not follow from the scores.
    """
    path = Path(path)
    lines, faults = read_lines(path, "n-best file", _REMEDY)
    if not faults and len(lines) != manifest.num_lines:
        rule = f"an n-best file must have a line for each of the {manifest.num_lines} utterances of {manifest.path}"
        faults.append(Fault(str(path), None, rule, f"it has {len(lines)}", _REMEDY))
    entries = []
    if not faults:
        for number, (line, (audio, _)) in enumerate(zip(lines, manifest.entries, strict=True), start=1):
            entry, problems = _parse(line)
            if entry is not None:
                problems = [*_entry_problems(entry, audio, symbols), *_weight_problems(entry, line)]
                entries.append(entry)
            faults += [Fault(str(path), number, *problem) for problem in problems]
    if faults:
        listed = "\n  ".join(map(str, faults[:MAX_LISTED_FAULTS]))
        more = len(faults) - MAX_LISTED_FAULTS
        raise ValueError(f"{path} cannot be used:\n  {listed}" + (f"\n  and {more} more" if more > 0 else ""))
    return entries


Problem = tuple[str, str, str]  # rule, what came, remedy


def _parse(line: str) -> tuple[NbestEntry | None, list[Problem]]:
    """A line as an entry whose fields have their types, or what is wrong with it."""
    try:
        return entry_of(json.loads(line)), []
    except (json.JSONDecodeError, KeyError, TypeError, OverflowError):
        shown = line if len(line) <= 80 else f"{line[:77]}..."
        rule = 'a line must be {"audio": FILE, "hypotheses": [{"units": TEXT, "score": NUMBER, "confidence": NUMBER}, ...]}'
        return None, [(rule, f"it is {shown!r}", _REMEDY)]


def entry_of(value: Any) -> NbestEntry:
    """The entry of a parsed line; KeyError or TypeError where fields are missing or of another type."""
    hypotheses = []
    for fields in value["hypotheses"]:
        units, score, confidence = (fields[name] for name in _FIELDS)
        if not isinstance(units, str) or any(isinstance(x, bool | str) for x in (score, confidence)):
            raise TypeError(f"{_FIELDS} must be a text and two numbers, but are {fields!r}")
        hypotheses.append(Hypothesis(units, float(score), float(confidence)))
    if not isinstance(value["audio"], str):
        raise TypeError(f"`audio` must be a text, but is {value['audio']!r}")
    return NbestEntry(value["audio"], tuple(hypotheses))


def _entry_problems(entry: NbestEntry, audio: str, symbols: Collection[str] | None) -> Iterator[Problem]:
    if entry.audio != audio:
        yield f"the utterance must be the manifest's, {audio!r}", f"it is {entry.audio!r}", _REMEDY
    if any(not hypothesis.units.split() for hypothesis in entry.hypotheses):
        yield "a hypothesis must have at least one unit", "one is empty", "remove it, or the utterance"
    repeated = _repeated([" ".join(hypothesis.units.split()) for hypothesis in entry.hypotheses])
    if repeated is not None:
        yield "the hypotheses of an utterance must differ", f"{repeated!r} is there twice", "keep the better one"
    used = {unit for hypothesis in entry.hypotheses for unit in hypothesis.units.split()}
    if symbols is not None and (unknown := sorted(used - set(symbols))):
        found = f"{', '.join(map(repr, unknown[:8]))} {'is' if len(unknown) == 1 else 'are'} not"
        yield "units must be in the dictionary", found, "use the dictionary that was written with the n-best file"
    numbers = [(hypothesis.score, hypothesis.confidence) for hypothesis in entry.hypotheses]
    for score, confidence in numbers:
        if not math.isfinite(score):
            yield "`score` must be a finite number, the natural logarithm of a probability", f"it is {score}", _REMEDY
        if not 0 <= confidence <= 1:
            yield "`confidence` must be in [0, 1], a mean posterior", f"it is {confidence}", _REMEDY
    if any(better[0] < worse[0] for better, worse in itertools.pairwise(numbers)):
        scores = ", ".join(f"{score:g}" for score, _ in numbers)
        yield "hypotheses must stand best first", f"their scores are {scores}", "sort them by `score`, falling"


def _weight_problems(entry: NbestEntry, line: str) -> Iterator[Problem]:
    """Weights are there to be read; training makes them from the scores, so one that was edited would do nothing."""
    found = [fields.get("weight") for fields in json.loads(line)["hypotheses"]]
    if all(weight is None for weight in found) or not all(math.isfinite(h.score) for h in entry.hypotheses):
        return
    fits = [
        isinstance(w, int | float) and math.isclose(w, p, abs_tol=1e-5)
        for w, p in zip(found, entry.weights, strict=True)
    ]
    if not all(fits):
        expected = ", ".join(f"{p:.6g}" for p in entry.weights)
        yield (
            f"`weight` must be exp(score) over its sum, so {expected}",
            f"they are {found}",
            "edit scores, or leave it out",
        )


def _repeated(texts: Sequence[str]) -> str | None:
    return next((text for i, text in enumerate(texts) if text in texts[:i]), None)
