"""Decoded utterances to what training reads: filtered, and written as manifest, labels, n-best file, dictionary and report."""

from __future__ import annotations

import collections
import itertools
import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s3distill.data.label_text import LabelText
from s3distill.data.labelled_split import LabelledSplit
from s3distill.data.manifest import (
    PathLike,
    read_dictionary,
    read_labels,
    write_dictionary,
    write_lines,
    write_manifest,
)
from s3distill.data.manifest_check import num_frames
from s3distill.data.manifest_lines import Manifest
from s3distill.data.nbest import ENDING, Hypothesis, NbestEntry, write_nbest
from s3distill.data.pseudo_label_journal import Decoded
from s3distill.data.text_filters import Candidate, TextFilters
from s3distill.encoder.config import SAMPLE_RATE

DICTIONARY = "dict.ltr.txt"
UNWRITABLE = "not_in_dictionary"  # the best hypothesis has a symbol that the target dictionary lacks
TOO_LONG = "too_long_for_ctc"  # more symbols than frames at 50 Hz
KEEP_BEST = "keep_best"  # less sure than the share that is kept


@dataclass
class Selection:
    """What the filters left of a manifest.

    Attributes:
        indices: utterances that stay, in the manifest's order.
        entries: their hypotheses.
        removed: filter -> utterances whose best hypothesis it removed, in the order in which the filters look.
        num_dropped: hypotheses of the utterances that stay, behind the best, that a filter removed.
    """

    indices: list[int] = field(default_factory=list)
    entries: list[NbestEntry] = field(default_factory=list)
    removed: dict[str, list[int]] = field(default_factory=dict)
    num_dropped: int = 0

    def split(self, manifest: Manifest) -> LabelledSplit:
        """The utterances that stay.

        Raises:
            ValueError: there are none.
        """
        if not self.indices:
            counts = ", ".join(f"{name} {len(found)}" for name, found in self.removed.items() if found)
            raise ValueError(
                f"an utterance must be left to train on, but all {len(manifest.entries)} of {manifest.path} were removed ({counts}); "
                "nothing was written: loosen the filters, or use a better teacher"
            )
        return LabelledSplit(manifest.root, [manifest.entries[index][1] for index in self.indices], self.entries)


def read_reference(path: Path, manifest: Manifest, text: LabelText) -> list[str]:
    """Words of each utterance of a manifest from its label file (`.ltr`, or `.wrd`, which holds words already).

    Raises:
        ValueError: it cannot be read, or has another number of lines.
    """
    lines = read_labels(path)
    if len(lines) != manifest.num_lines:
        raise ValueError(
            f"{path} must have a line for each of the {manifest.num_lines} utterances of {manifest.path}, but has {len(lines)}; give the "
            "labels of this manifest"
        )
    return lines if path.suffix == ".wrd" else [text.words(line.split()) for line in lines]


def select(
    manifest: Manifest,
    decoded: Decoded,
    text: LabelText,
    filters: TextFilters,
    reference: Sequence[str] | None,
    keep_best: float = 1.0,
) -> Selection:
    """Judges the text of every hypothesis, and how sure the best is: an utterance goes with its best one, the others go alone.

    Args:
        decoded: all utterances of the manifest.
        reference: words of each utterance, where they are known.
        keep_best: share, in (0, 1], of the utterances behind the other filters that stays: those with the highest log-probability
            per symbol. Unlike a threshold it means the same for every teacher, however sure that is of itself.
    """
    names = [UNWRITABLE, *filters.names, TOO_LONG]
    selection = Selection(removed={name: [] for name in names})
    for index, (audio, num_samples) in enumerate(manifest.entries):
        if decoded[index].get("unwritable"):
            selection.removed[UNWRITABLE].append(index)
            continue
        hypotheses = [Hypothesis(**fields) for fields in decoded[index]["hypotheses"]]
        known = None if reference is None else reference[index]
        verdicts = [_judge(hypothesis, hypotheses[0], num_samples, text, filters, known) for hypothesis in hypotheses]
        if verdicts[0] is not None:
            selection.removed[verdicts[0]].append(index)
            continue
        kept = tuple(h for h, verdict in zip(hypotheses, verdicts, strict=True) if verdict is None)
        selection.num_dropped += len(hypotheses) - len(kept)
        selection.indices.append(index)
        selection.entries.append(NbestEntry(audio, kept))
    if keep_best < 1:
        _keep_surest(selection, math.ceil(keep_best * len(selection.indices)))
    return selection


def _keep_surest(selection: Selection, number: int) -> None:
    sureness = [_score_per_unit(entry.hypotheses[0]) for entry in selection.entries]
    kept = sorted(sorted(range(len(sureness)), key=lambda i: -sureness[i])[:number])
    selection.removed[KEEP_BEST] = sorted(set(selection.indices) - {selection.indices[i] for i in kept})
    selection.indices = [selection.indices[i] for i in kept]
    selection.entries = [selection.entries[i] for i in kept]


def _score_per_unit(hypothesis: Hypothesis) -> float:
    return hypothesis.score / max(len(hypothesis.units.split()), 1)


def _judge(
    hypothesis: Hypothesis,
    best: Hypothesis,
    num_samples: int,
    text: LabelText,
    filters: TextFilters,
    reference: str | None,
) -> str | None:
    """The filter that removes a hypothesis. Doubt is the utterance's, so it is that of the best one: the weights of K-best
    training know already that the others are less likely."""
    units = hypothesis.units.split()
    seconds = num_samples / SAMPLE_RATE
    verdict = filters.judge(Candidate(text.words(units), seconds, best.confidence, reference, _score_per_unit(best)))
    if verdict is None and len(units) + sum(a == b for a, b in itertools.pairwise(units)) > num_frames(num_samples):
        return TOO_LONG  # the boundary behind the last word is not always the teacher's
    return verdict


@dataclass(frozen=True)
class OutputFiles:
    """The files of a split of pseudo-labels.

    Args:
        folder: where they go.
        name: the split.
    """

    folder: Path
    name: str

    def path(self, ending: str) -> Path:
        return self.folder / f"{self.name}.{ending}"

    def check(self, manifest_path: PathLike, text: LabelText | None, overwrite: bool) -> None:
        """What would be lost by writing, found before anything is decoded.

        Args:
            text: the dictionary that is to be written; None: it is not known yet.
        Raises:
            ValueError: an output is there already without ``overwrite``, is the manifest itself, or the folder's dictionary is another.
        """
        endings = ("tsv", "ltr", "wrd", ENDING, "conf", "report.json")
        if self.path("tsv").resolve() == Path(manifest_path).resolve():
            raise ValueError(
                f"pseudo-labels must not overwrite the manifest that they are made of, but {self.path('tsv')} is it; choose another -o or "
                "--name"
            )
        there = [self.path(ending) for ending in endings if self.path(ending).exists()]
        if there and not overwrite:
            raise ValueError(
                f"{there[0]} must not be there yet, but is; pass --overwrite to write it again (utterances that are decoded stay so), or "
                "another -o or --name"
            )
        dictionary = self.folder / DICTIONARY
        if text is not None and dictionary.exists() and list(read_dictionary(dictionary)) != list(text.symbols):
            raise ValueError(
                f"{dictionary} must have the symbols of these labels in their order, since other splits use it, but has others; choose "
                "another output folder, or pass --dict with it"
            )

    def write(self, split: LabelledSplit, text: LabelText, values: dict[str, Any]) -> None:
        """Writes all files under temporary names first, then renames them; the manifest comes last."""
        best = [entry.hypotheses[0] for entry in split.entries]
        lines = [hypothesis.units for hypothesis in best]
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{self.name}.", dir=self.folder) as temporary:
            new = OutputFiles(Path(temporary), self.name)
            write_lines(new.path("ltr"), lines)
            if text.has_words:
                write_lines(new.path("wrd"), (text.words(line.split()) for line in lines))
            write_nbest(new.path(ENDING), split.entries)
            write_lines(new.path("conf"), (f"{hypothesis.confidence:.4f}" for hypothesis in best))
            write_lines(new.path("report.json"), [json.dumps(values, indent=2)])
            if not (self.folder / DICTIONARY).exists():
                counts = collections.Counter(itertools.chain.from_iterable(line.split() for line in lines))
                write_dictionary(new.folder / DICTIONARY, {symbol: counts[symbol] for symbol in text.symbols})
            audio = (entry.audio for entry in split.entries)
            write_manifest(new.path("tsv"), split.root, zip(audio, split.num_samples, strict=True))
            self.path("tsv").unlink(
                missing_ok=True
            )  # the old one must not stand beside new labels, should this be killed
            if not text.has_words:
                self.path("wrd").unlink(missing_ok=True)
            for path in sorted(new.folder.iterdir(), key=lambda path: path.suffix == ".tsv"):
                os.replace(path, self.folder / path.name)
