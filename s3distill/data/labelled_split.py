"""Utterances with their n-best lists, ready to be written as a split: pseudo-labels, gold labels, and both together."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from s3distill.data.label_text import LabelText
from s3distill.data.manifest import PathLike, label_path, read_labels, validate_for_training
from s3distill.data.manifest_check import RECEPTIVE_FIELD
from s3distill.data.manifest_lines import Manifest
from s3distill.data.nbest import Hypothesis, NbestEntry


@dataclass(frozen=True)
class LabelledSplit:
    """Utterances of a split.

    Args:
        root: the folder that their audio is relative to, absolute.
        num_samples: length of each.
        entries: their hypotheses, best first.
    """

    root: Path
    num_samples: list[int]
    entries: list[NbestEntry]


def gold_split(manifest_path: PathLike, text: LabelText, pool: Manifest) -> LabelledSplit:
    """A labelled manifest: its `.ltr` line is the only hypothesis of each utterance, certain (score 0, confidence 1).

    Args:
        text: the dictionary that all labels are written in.
        pool: the manifest that is pseudo-labelled, which must hold other utterances.
    Raises:
        ValueError: manifest or labels have a fault, a label cannot be written in the dictionary, or a file is in the pool, too.
    """
    path = label_path(manifest_path, "ltr")
    manifest = validate_for_training(manifest_path, path, min_samples=RECEPTIVE_FIELD)
    twice = {*map(manifest.audio_path, range(len(manifest.entries)))} & {
        *map(pool.audio_path, range(len(pool.entries)))
    }
    if twice:
        raise ValueError(
            f"labelled and pseudo-labelled utterances must be different files, but {len(twice)} are in both {manifest.path} and "
            f"{pool.path}, such as {min(twice)}; remove them from one"
        )
    entries = []
    for number, (line, (audio, _)) in enumerate(zip(read_labels(path), manifest.entries, strict=True), start=1):
        units = text.normalise(line.split())
        if not units:
            raise ValueError(
                f"{path}:{number}: labels must be of the dictionary of the pseudo-labels ({' '.join(text.symbols[:12])} ...), but are "
                f"{line!r}; pass that of both as --dict"
            )
        entries.append(NbestEntry(audio, (Hypothesis(" ".join(units), 0.0, 1.0),)))
    return LabelledSplit(manifest.root, [num_samples for _, num_samples in manifest.entries], entries)


def join_splits(first: LabelledSplit, second: LabelledSplit) -> LabelledSplit:
    """Both, one behind the other, below the folder that their roots share."""
    root = Path(os.path.commonpath([first.root, second.root]))
    entries = [
        NbestEntry((split.root / entry.audio).relative_to(root).as_posix(), entry.hypotheses)
        for split in (first, second)
        for entry in split.entries
    ]
    return LabelledSplit(root, first.num_samples + second.num_samples, entries)
