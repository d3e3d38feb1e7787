"""Labelled and unlabelled utterances in one run, in a given proportion."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from fairseq.data import FairseqDataset, data_utils

from s3distill.tasks._audio import SeededCropDataset


class MixedLabelsDataset(FairseqDataset):
    """Every epoch has all labelled utterances, and so many unlabelled ones that they are ``share`` of it.

    The unlabelled are drawn by seed and epoch alone, in passes: each is heard once before one is heard again, so that a long
    run hears all of them, and a resumed one the same. Batches have ``labelled`` [B] bool, beside fairseq's ``target`` and
    ``target_lengths``, in which unlabelled rows are empty.

    Args:
        labelled: a dataset with labels; its ``id`` counts from 0.
        unlabelled: audio alone, padded; its ids come behind the labelled ones'.
        share: of the epoch's utterances, in (0, 1).
        pad: index that fills ``target``.
    """

    def __init__(self, labelled: Any, unlabelled: SeededCropDataset, share: float, seed: int, pad: int) -> None:
        super().__init__()
        self.labelled, self.unlabelled, self.seed, self.pad, self.epoch = labelled, unlabelled, seed, pad, 1
        self.num_drawn = max(1, round(len(labelled) * share / (1 - share)))
        self.sizes = np.concatenate([np.asarray(labelled.sizes), np.asarray(unlabelled.sizes)])

    def __len__(self) -> int:
        return len(self.labelled) + len(self.unlabelled)

    def __getitem__(self, index: int) -> dict[str, Any]:
        first = len(self.labelled)
        if index < first:
            return self.labelled[index]  # type: ignore[no-any-return]
        return {**self.unlabelled[index - first], "id": index}

    def drawn(self, epoch: int) -> list[int]:
        """The unlabelled utterances of an epoch (from 1 on), counted from 0; one comes twice where the epoch asks for more than all."""
        size, chosen = len(self.unlabelled), list[int]()
        position, end = (epoch - 1) * self.num_drawn, epoch * self.num_drawn
        while position < end:
            number, offset = divmod(position, size)
            order = np.random.default_rng([self.seed, number]).permutation(size)
            chosen += order[offset : offset + end - position].tolist()
            position += min(size - offset, end - position)
        return chosen

    def ordered_indices(self) -> Any:
        """All labelled utterances and the epoch's unlabelled ones, by length, the longest first; equal ones in random order."""
        first = len(self.labelled)
        indices = np.concatenate([np.arange(first), first + np.array(self.drawn(self.epoch), dtype=np.int64)])
        indices = np.random.permutation(indices)  # fairseq has seeded it by seed and epoch
        return indices[np.argsort(self.sizes[indices], kind="stable")[::-1]]

    def num_tokens(self, index: int) -> int:
        return int(self.sizes[index])

    def size(self, index: int) -> Any:
        return self.labelled.size(index) if index < len(self.labelled) else (int(self.sizes[index]), 0)

    def filter_indices_by_size(self, indices: Any, max_sizes: Any) -> Any:
        return data_utils._filter_by_size_dynamic(indices, self.size, max_sizes)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.epoch = epoch
        for dataset in (self.labelled, self.unlabelled):
            dataset.set_epoch(epoch)

    @property
    def can_reuse_epoch_itr_across_epochs(self) -> bool:
        return False

    def collater(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = self.unlabelled.collater(samples)
        if len(batch) == 0:
            return batch
        labels = {sample["id"]: sample["label"] for sample in samples if "label" in sample}
        ids = batch["id"].tolist()
        targets = [labels.get(i, torch.zeros(0, dtype=torch.int32)) for i in ids]
        batch["labelled"] = torch.tensor([i in labels for i in ids])
        batch["target_lengths"] = torch.tensor([len(target) for target in targets])
        batch["ntokens"] = int(batch["target_lengths"].sum())
        batch["target"] = data_utils.collate_tokens(targets, pad_idx=self.pad, left_pad=False)
        return batch


def check_unlabelled_options(cfg: Any) -> None:
    """What unlabelled audio asks of the task's other options.

    Args:
        cfg: options of `audio_ctc_distill`.
    Raises:
        ValueError: with the option to change.
    """
    if not cfg.unlabelled_subset:
        if cfg.unlabelled_weight != 0.5:
            raise ValueError(
                f"`task.unlabelled_weight` is {cfg.unlabelled_weight}, but task.unlabelled_subset names no manifest; pass it, or leave the "
                "weight out"
            )
        return
    if not 0 < cfg.unlabelled_weight < 1:
        raise ValueError(
            f"`task.unlabelled_weight` is the share of unlabelled utterances in an epoch and must be in (0, 1), but is "
            f"{cfg.unlabelled_weight}; 0.5 hears as many as there are labelled ones"
        )
    given = [
        name
        for name, without in (
            ("nbest", False),
            ("multi_corpus_keys", None),
            ("binarized_dataset", False),
            ("subsample", 1.0),
        )
        if getattr(cfg, name) != without
    ] + (["num_batch_buckets"] if cfg.num_batch_buckets else [])
    if given:
        raise ValueError(
            f"`task.{given[0]}` is not supported beside task.unlabelled_subset={cfg.unlabelled_subset}, but is "
            f"{getattr(cfg, given[0])!r}; leave one of them out"
        )
