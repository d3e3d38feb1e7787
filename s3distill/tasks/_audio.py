"""What the audio tasks share: checks before training, manifests with relative roots, crops that a seed decides."""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq.data.audio.raw_audio_dataset import FileAudioDataset
from torch import Tensor

from s3distill.data.audio import read_audio
from s3distill.data.manifest import read_manifest, validate_for_training

logger = logging.getLogger(__name__)


class CheckedAudioDataset(FileAudioDataset):
    """fairseq's `FileAudioDataset` that refuses by name what it cannot use; fairseq's own averages the channels of stereo."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = self.fnames[index]
        name = self.text_compressor.decompress(name if isinstance(self.fnames, list) else name.as_py())
        samples = torch.from_numpy(read_audio(os.path.join(self.root_dir, name), self.sample_rate))
        return {"id": index, "source": self.postprocess(samples, self.sample_rate)}


class SeededCropDataset(CheckedAudioDataset):
    """fairseq's `FileAudioDataset` whose random crops depend on seed, epoch and utterance only, so resumed runs repeat them."""

    def __init__(self, *args: Any, seed: int = 1, **options: Any) -> None:
        super().__init__(*args, **options)
        self.seed, self.epoch = seed, 1
        self._rng = np.random.default_rng(seed)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.epoch = epoch

    @property
    def can_reuse_epoch_itr_across_epochs(self) -> bool:
        return False

    def collater(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        first = samples[0]["id"] if samples else 0
        self._rng = np.random.default_rng([self.seed, self.epoch, first])
        return super().collater(samples)

    def crop_to_max_size(self, t: Tensor, target_size: int, dim: int = 0) -> Tensor:
        surplus = t.size(dim) - target_size
        if surplus <= 0:
            return t
        return t.narrow(dim, int(self._rng.integers(surplus + 1)), target_size)


def check_split(
    data: str,
    split: str,
    labels: str | None,
    dictionary: str | None = None,
    frames_of: Callable[[int], int] | None = None,
) -> Path:
    """Validates a split's manifest (and labels) before training and returns the manifest's root folder.

    Args:
        frames_of: see `validate_for_training`.
    Raises:
        FileNotFoundError, ValueError: the first faults with file, line, rule and remedy.
    """
    manifest_path = Path(data) / f"{split}.tsv"
    label_path = Path(data) / f"{split}.{labels}" if labels else None
    dict_path = Path(dictionary or data) / f"dict.{labels}.txt" if labels else None
    validate_for_training(manifest_path, label_path, dict_path, frames_of=frames_of)
    return Path(read_manifest(manifest_path).root)


def set_root(dataset: Any, root: Path) -> None:
    """Gives the audio dataset inside wrappers (labels, subsets) its absolute root, and checked reading."""
    while not isinstance(dataset, FileAudioDataset):
        dataset = dataset.dataset
    dataset.root_dir = str(root)
    if type(dataset) is FileAudioDataset:
        dataset.__class__ = CheckedAudioDataset  # fairseq's tasks build it by name; only reading differs
