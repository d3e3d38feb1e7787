"""Batches with a teacher's n-best hypotheses, for `criterion.seq_kd`."""

import logging
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from fairseq.data import BaseWrapperDataset, Dictionary

from s3distill.data.manifest import read_manifest
from s3distill.data.nbest import NbestEntry, nbest_path, read_nbest
from s3distill.losses.sequence import NbestTargets

logger = logging.getLogger(__name__)


class NbestDataset(BaseWrapperDataset):
    """A labelled dataset whose batches also have ``nbest``: the fields of `NbestTargets`.

    Scores are float64, which fairseq's half precision leaves alone.

    Args:
        dataset: gives ``id``, the position among its utterances.
        entries: hypotheses of each.
        dictionary: symbols of the model's output.
    """

    def __init__(self, dataset: Any, entries: Sequence[NbestEntry], dictionary: Dictionary) -> None:
        super().__init__(dataset)
        if len(entries) != len(dataset):
            raise ValueError(f"n-best lists must be of the {len(dataset)} utterances, but are of {len(entries)}")
        self.entries, self.dictionary = entries, dictionary

    def collater(self, samples: Sequence[Any]) -> Any:
        batch = self.dataset.collater(samples)
        if len(batch) > 0:
            targets = nbest_targets([self.entries[index] for index in batch["id"].tolist()], self.dictionary)
            batch["nbest"] = {"symbols": targets.symbols, "lengths": targets.lengths, "scores": targets.scores}
        return batch


def nbest_targets(entries: Sequence[NbestEntry], dictionary: Dictionary) -> NbestTargets:
    """The hypotheses of a batch as tensors; what an utterance lacks has the score -inf."""
    rows = [[[dictionary.index(unit) for unit in h.units.split()] for h in entry.hypotheses] for entry in entries]
    num_best = max(1, *map(len, rows))
    longest = max((len(symbols) for row in rows for symbols in row), default=1)
    symbols = torch.full((len(rows), num_best, longest), dictionary.pad())
    lengths = torch.zeros(len(rows), num_best, dtype=torch.int64)
    scores = torch.full((len(rows), num_best), -math.inf, dtype=torch.float64)
    for b, row in enumerate(rows):
        for k, hypothesis in enumerate(row):
            symbols[b, k, : len(hypothesis)] = torch.tensor(hypothesis)
            lengths[b, k], scores[b, k] = len(hypothesis), entries[b].hypotheses[k].score
    return NbestTargets(symbols, lengths, scores)


def with_nbest(dataset: Any, manifest_path: Path, dictionary: Dictionary) -> NbestDataset:
    """The dataset of a manifest with the hypotheses of its n-best file.

    Raises:
        ValueError: the file is missing, or does not fit the manifest or the dictionary; see `read_nbest`.
    """
    symbols = dictionary.symbols[dictionary.nspecial :]
    return NbestDataset(dataset, entries_of(dataset, nbest_path(manifest_path), manifest_path, symbols), dictionary)


def entries_of(dataset: Any, path: Path, manifest_path: Path, symbols: Collection[str]) -> list[NbestEntry]:
    """The n-best lists of a dataset's utterances; those without a hypothesis learn nothing from them.

    Raises:
        ValueError: see `read_nbest`; or no utterance has a hypothesis.
    """
    entries = read_nbest(path, read_manifest(manifest_path), symbols)
    audio = dataset
    while hasattr(audio, "dataset"):
        audio = audio.dataset
    skipped = getattr(audio, "skipped_indices", set())  # too short for task.min_sample_size
    used = [entry for i, entry in enumerate(entries) if i not in skipped]
    num_empty = sum(not entry.hypotheses for entry in used)
    if num_empty == len(used):
        raise ValueError(
            f"{path} must have a hypothesis to train on, but none of its {len(used)} utterances has one; decode them with a better model"
        )
    if num_empty:
        logger.warning(
            "%s: %d of %d utterances have no hypothesis, and learn nothing from it", path, num_empty, len(used)
        )
    return used
