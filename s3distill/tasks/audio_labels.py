"""`audio_labels`: audio with one label per utterance, for classification."""

# no `from __future__ import annotations`: fairseq reads the types of config fields
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from fairseq.tasks import register_task
from fairseq.tasks.audio_pretraining import AudioPretrainingConfig, AudioPretrainingTask
from omegaconf import II

from s3distill import compat
from s3distill.data.manifest import validate_for_training
from s3distill.data.manifest_check import RECEPTIVE_FIELD
from s3distill.data.utterance_labels import classes_of_dictionary, classes_of_labels, read_utterance_labels
from s3distill.encoder.config import SAMPLE_RATE
from s3distill.tasks._audio import SeededCropDataset, set_root

logger = logging.getLogger(__name__)

LAST = "checkpoint_last.pt"  # fairseq's default of checkpoint.restore_file: go on with the run in save_dir


@dataclass
class AudioLabelsConfig(AudioPretrainingConfig):
    """fairseq's `audio_pretraining` options; ``labels`` is the ending of the label files (``digit``: train.digit, dict.digit.txt)."""

    # what follows says where this run's head comes from, and need not be set
    train_subset: str = II("dataset.train_subset")
    save_dir: str = II("checkpoint.save_dir")
    restore_file: str = II("checkpoint.restore_file")
    finetune_from_model: Optional[str] = II("checkpoint.finetune_from_model")


class LabelledAudioDataset(SeededCropDataset):
    """Audio with a class per utterance: batches have ``target``, [B] int64. Audio beyond ``max_sample_size`` is cropped at random."""

    targets: torch.Tensor  # [N]

    def set_targets(self, targets: Sequence[int]) -> None:
        """Takes the class of every line of the manifest; those of utterances that were too short are left out here, too."""
        kept = [target for line, target in enumerate(targets) if line not in self.skipped_indices]
        assert len(kept) == len(self)
        self.targets = torch.tensor(kept, dtype=torch.int64)

    def size(self, index: int) -> int:
        return min(int(self.sizes[index]), self.max_sample_size)

    def num_tokens(self, index: int) -> int:
        return self.size(index)

    def collater(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = super().collater(samples)
        return {**batch, "target": self.targets[batch["id"]]} if batch else batch


@register_task("audio_labels", dataclass=AudioLabelsConfig)
class AudioLabelsTask(AudioPretrainingTask):
    """SPLIT.tsv with SPLIT.LABELS, one class name per line; the index of a class is its place in ``classes``.

    ``classes`` are those of the checkpoint that the head comes from, if there is one; else those of dict.LABELS.txt, in its order; else
    those of the training labels, sorted. They stand in checkpoints (``task_state``), so that decoding needs no file.
    """

    cfg: AudioLabelsConfig

    def __init__(self, cfg: AudioLabelsConfig) -> None:
        if not cfg.labels:
            raise ValueError(
                "`task.labels` must name the label files' ending, but is empty; pass e.g. task.labels=digit"
            )
        for option, expected in (("multi_corpus_keys", None), ("binarized_dataset", False), ("subsample", 1.0)):
            if getattr(cfg, option, expected) != expected:
                raise ValueError(
                    f"`task.{option}` is not supported by audio_labels and must stay {expected}, but is {getattr(cfg, option)!r}; prepare "
                    "a manifest of the wanted utterances instead"
                )
        super().__init__(cfg)
        self.classes_from = "the checkpoint"  # for messages
        self.state.add_factory("classes", self._classes_of_data)

    @property
    def classes(self) -> list[str]:
        """Class names, index = output of the head."""
        return list(self.state.classes)

    @property
    def _dictionary(self) -> Path:
        return Path(self.cfg.data) / f"dict.{self.cfg.labels}.txt"

    def _classes_of_data(self) -> list[str]:
        if self._dictionary.is_file():
            classes, source = classes_of_dictionary(self._dictionary), self._dictionary
        else:
            source = Path(self.cfg.data) / f"{self.cfg.train_subset}.{self.cfg.labels}"
            classes = classes_of_labels(source)
        self.classes_from = str(source)
        logger.info("%d classes of %s: %s", len(classes), source, ", ".join(classes[:20]))
        return classes

    def build_model(self, model_cfg: Any, from_checkpoint: bool = False) -> Any:
        path = None if from_checkpoint else self._head_comes_from(model_cfg)
        if path is not None:
            self._take_classes(path)
        return super().build_model(model_cfg, from_checkpoint)

    def _head_comes_from(self, model_cfg: Any) -> Optional[str]:
        """The checkpoint that fairseq's trainer is going to load the head from; it does so after the model was built."""
        if self.cfg.restore_file != LAST:
            return self.cfg.restore_file
        last = os.path.join(self.cfg.save_dir, LAST)
        if os.path.isfile(last):
            return last
        masks_only = getattr(model_cfg, "load_mask_only", False) or getattr(model_cfg, "load_mask_before", 0)
        return None if masks_only else self.cfg.finetune_from_model

    def _take_classes(self, path: str) -> None:
        """Classes in another order than the head's would give wrong labels without an error."""
        classes = (compat.load_checkpoint(path).get("task_state") or {}).get("classes")
        if classes is None:
            return  # no run of this task: that its head does not fit, loading it will say
        if self._dictionary.is_file() and classes_of_dictionary(self._dictionary) != classes:
            differing = sorted(set(classes) ^ set(classes_of_dictionary(self._dictionary))) or ["their order"]
            raise ValueError(
                f"{self._dictionary} must have the classes of {path}, whose head is used, but differs in {', '.join(differing[:8])}; "
                "remove it to take those of the checkpoint, or start a new run elsewhere (hydra.run.dir)"
            )
        self.classes_from = path
        self.state.merge_state_dict({"classes": list(classes)})

    def load_dataset(self, split: str, task_cfg: Any = None, **kwargs: Any) -> None:
        options = task_cfg or self.cfg
        if options.sample_rate != SAMPLE_RATE:
            raise ValueError(
                f"`task.sample_rate` must be {SAMPLE_RATE}, the rate of every backbone here, but is {options.sample_rate}"
            )
        manifest_path = Path(self.cfg.data) / f"{split}.tsv"
        leaves_out_short = (self.cfg.min_sample_size or 0) >= RECEPTIVE_FIELD
        manifest = validate_for_training(manifest_path, min_samples=0 if leaves_out_short else RECEPTIVE_FIELD)
        classes = self.classes
        labels = read_utterance_labels(
            manifest_path.with_suffix(f".{options.labels}"), manifest, classes, self.classes_from
        )
        dataset = LabelledAudioDataset(
            manifest_path=str(manifest_path),
            sample_rate=options.sample_rate,
            max_sample_size=self.cfg.max_sample_size,
            min_sample_size=self.cfg.min_sample_size,
            pad=True,
            normalize=options.normalize,
            num_buckets=self.cfg.num_batch_buckets,
            seed=self.cfg.seed,
        )
        if len(dataset) == 0:
            raise ValueError(
                f"{manifest_path} has no utterance of at least task.min_sample_size = {self.cfg.min_sample_size} samples; lower that limit"
            )
        index = {name: i for i, name in enumerate(classes)}
        dataset.set_targets([index[label] for label in labels])
        set_root(dataset, manifest.root)
        self.datasets[split] = dataset

    def get_batch_iterator(self, dataset: Any, max_tokens: Optional[int] = None, *args: Any, **kwargs: Any) -> Any:
        longest = max(dataset.size(i) for i in range(len(dataset)))
        if max_tokens is not None and longest > max_tokens:
            raise ValueError(
                f"a batch must hold the longest utterance, {longest} samples, but dataset.max_tokens (or max_tokens_valid) is {max_tokens} "
                "samples; raise it, or crop with task.max_sample_size"
            )
        # fairseq drops the last batch, the shortest utterances, where its size is no multiple of this option (8 by default)
        kwargs["required_batch_size_multiple"] = 1
        return super().get_batch_iterator(dataset, max_tokens, *args, **kwargs)
