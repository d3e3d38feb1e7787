"""`audio_distill`: unlabelled audio and a frozen teacher."""

# no `from __future__ import annotations`: fairseq reads the types of config fields
import logging
import math
import os
from dataclasses import dataclass, field
from typing import Any, List, Optional

from fairseq.dataclass import ChoiceEnum
from fairseq.tasks import register_task
from fairseq.tasks.audio_pretraining import AudioPretrainingConfig, AudioPretrainingTask
from omegaconf import II

from s3distill import compat
from s3distill.encoder.checkpoint import parse_checkpoint
from s3distill.encoder.config import SAMPLE_RATE
from s3distill.encoder.teacher import DTYPES, Teacher
from s3distill.losses import normalize_target
from s3distill.masks.state import baked
from s3distill.models._student_parts import keep_filled
from s3distill.tasks._audio import SeededCropDataset, check_split
from s3distill.tasks._autocast import AUTOCAST_DTYPES, AutocastSteps, check_autocast
from s3distill.tasks._diverged import require_finite_parameters

logger = logging.getLogger(__name__)

NUM_FIT_UTTERANCES = 16  # for least-squares heads: at 10 s each, 8,000 frames for at most 1,024 x 1,024 unknowns


@dataclass
class AudioDistillConfig(AudioPretrainingConfig):
    """fairseq's `audio_pretraining` options, plus the teacher."""

    teacher_path: Optional[str] = field(
        default=None, metadata={"help": "checkpoint of the teacher, pre-trained or fine-tuned"}
    )
    teacher_dtype: ChoiceEnum(list(DTYPES)) = field(  # type: ignore[valid-type]
        default="float32", metadata={"help": "precision that the teacher runs in"}
    )
    autocast_dtype: ChoiceEnum(list(AUTOCAST_DTYPES)) = field(  # type: ignore[valid-type]
        default="none",
        metadata={
            "help": "bfloat16: matrix products of the student in bfloat16, on CPU and GPU; parameters, gates and losses stay "
            "float32. Not beside common.fp16, bf16 or amp"
        },
    )
    extra_teacher_paths: List[str] = field(
        default_factory=list,
        metadata={
            "help": "checkpoints of further teachers, at the same frame rate; each gets prediction heads of its own"
        },
    )
    teacher_weights: List[float] = field(
        default_factory=list,
        metadata={"help": "weight of each teacher's loss, that of teacher_path first; empty: 1 each, summed"},
    )
    train_subset: str = II("dataset.train_subset")
    fp16: bool = II("common.fp16")
    bf16: bool = II("common.bf16")
    amp: bool = II("common.amp")


@register_task("audio_distill", dataclass=AudioDistillConfig)
class AudioDistillTask(AutocastSteps, AudioPretrainingTask):
    """Loads manifests as they are, and the teachers when something first asks for them.

    They are no attribute that fairseq saves: checkpoints of students rebuild and fine-tune without their files.
    """

    cfg: AudioDistillConfig

    def __init__(self, cfg: AudioDistillConfig) -> None:
        for option, expected in (("multi_corpus_keys", None), ("binarized_dataset", False), ("subsample", 1.0)):
            if getattr(cfg, option, expected) != expected:
                raise ValueError(
                    f"`task.{option}` is not supported by audio_distill and must stay {expected}, but is {getattr(cfg, option)!r}; "
                    "prepare a manifest of the wanted utterances instead"
                )
        check_autocast(cfg)
        super().__init__(cfg)
        self._teachers: List[Teacher] = []
        self._model: Any = None
        self._from_checkpoint = False

    @property
    def teacher(self) -> Teacher:
        """The first teacher, that of `task.teacher_path`."""
        return self.teachers[0]

    @property
    def num_teachers(self) -> int:
        return 1 + len(self.cfg.extra_teacher_paths)

    @property
    def teachers(self) -> List[Teacher]:
        """The frozen teachers, that of `task.teacher_path` first; their files are read on first use."""
        if not self._teachers:
            if not self.cfg.teacher_path:
                raise ValueError("`task.teacher_path` must name the teacher's checkpoint, but is empty")
            if not all(self.cfg.extra_teacher_paths):
                raise ValueError(
                    f"`task.extra_teacher_paths` must name a checkpoint each, but is {list(self.cfg.extra_teacher_paths)}"
                )
            weights = self.teacher_weights
            first = self._read_teacher(self.cfg.teacher_path, weights[0])
            if first.normalize != bool(self.cfg.normalize):
                raise ValueError(
                    f"`task.normalize` must be what the teacher was trained with: {self.cfg.teacher_path} has "
                    f"normalize={first.normalize}, but the task has {bool(self.cfg.normalize)}; pass "
                    f"task.normalize={str(first.normalize).lower()}"
                )
            others = []
            for path, weight in zip(self.cfg.extra_teacher_paths, weights[1:], strict=True):
                teacher = self._read_teacher(path, weight)
                if first.normalize and not teacher.normalize:
                    raise ValueError(
                        f"`task.extra_teacher_paths`: {path} was trained on waveforms that are not normalised, and task.normalize=true "
                        "leaves none; make it `task.teacher_path`, with task.normalize=false, and the others follow it"
                    )
                teacher.normalizes_itself = teacher.normalize and not first.normalize
                others.append(teacher)
            self._teachers = [first, *others]
        return self._teachers

    @property
    def teacher_weights(self) -> List[float]:
        """One weight per teacher."""
        weights = [float(weight) for weight in self.cfg.teacher_weights] or [1.0] * self.num_teachers
        if len(weights) != self.num_teachers:
            raise ValueError(
                f"`task.teacher_weights` must have one weight per teacher ({self.num_teachers}, that of task.teacher_path first), but "
                f"has {len(weights)}"
            )
        if not all(0 < weight < math.inf for weight in weights):
            raise ValueError(
                f"`task.teacher_weights` must be positive, but are {weights}; leave out a teacher that is not to count"
            )
        return weights

    def _read_teacher(self, path: str, weight: float) -> Teacher:
        parsed = baked(parse_checkpoint(compat.load_checkpoint(path), path), path)
        teacher = Teacher(parsed, str(self.cfg.teacher_dtype), f"teacher {path}")
        config = teacher.config
        logger.info(
            "teacher %s: %d layers, width %d, %s, weight %g",
            *(path, config.num_layers, config.embed_dim, teacher.dtype, weight),
        )
        return teacher

    def build_model(self, model_cfg: Any, from_checkpoint: bool = False) -> Any:
        if not from_checkpoint and not os.path.isdir(self.cfg.data):
            raise ValueError(
                f"`task.data` must be the folder of the manifests, but there is no folder {self.cfg.data}; make it with `s3distill "
                "manifest`"
            )
        self._from_checkpoint = from_checkpoint
        self._model = model = super().build_model(model_cfg, from_checkpoint)
        keep_filled(model_cfg, model.cfg, ("encoder", "encoder_embed_dim", "normalize"))
        return model

    def build_criterion(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        criterion = super().build_criterion(cfg, from_checkpoint)
        if self._model is not None and hasattr(criterion, "check_model"):  # fairseq builds the model first
            criterion.check_model(self._model, self.teachers)
            heads = self._model.heads
            trained = self._from_checkpoint or self._model.heads_loaded
            if heads is not None and heads.config.init == "least_squares" and not trained:
                self._fit_heads(self._model, str(criterion.cfg.target_norm))  # the criterion knows what they predict
        return criterion

    def state_dict(self) -> dict[str, Any]:
        """fairseq asks for it when it saves: a student that diverged is not written over a good one.

        At the end of an epoch fairseq may save without a validation, so that nothing has seen the last update's weights.
        """
        if self._model is not None:
            require_finite_parameters(self._model)
        return dict(super().state_dict())

    def _fit_heads(self, model: Any, target_norm: str) -> None:
        """Fits linear heads on the first training utterances; here, in front of the optimizer's fp32 copies, and alike on all ranks."""
        split = self.cfg.train_subset.split(",")[0]
        self.load_dataset(split)
        dataset = self.datasets[split]
        inputs = dataset.collater([dataset[i] for i in range(min(len(dataset), NUM_FIT_UTTERANCES))])["net_input"]
        source, padding_mask = inputs["source"], inputs.get("padding_mask")
        features = model.eval().extract_features(source, padding_mask)
        model.train()
        for teacher, heads in zip(self.teachers, model.heads.by_teacher, strict=True):
            deepest = max(teacher_layer for _, teacher_layer in heads.config.pairs)
            states, frame_mask = teacher.hidden_states(source, padding_mask, list(range(deepest + 1)))
            states = [normalize_target(state, frame_mask, target_norm) for state in states]
            heads.fit_least_squares(features["hidden_states"], states, features["padding_mask"])
        logger.info("heads fitted by least squares on %d utterances", source.shape[0])

    def get_batch_iterator(self, *args: Any, **options: Any) -> Any:
        # fairseq drops the last batch, the shortest utterances, where its size is no multiple of this option (8 by default)
        options["required_batch_size_multiple"] = 1
        return super().get_batch_iterator(*args, **options)

    def load_dataset(self, split: str, task_cfg: Any = None, **kwargs: Any) -> None:
        options = task_cfg or self.cfg
        if options.sample_rate != SAMPLE_RATE:
            raise ValueError(
                f"`task.sample_rate` must be {SAMPLE_RATE}, the rate of every teacher here, but is {options.sample_rate}"
            )
        root = check_split(self.cfg.data, split, None)
        dataset = SeededCropDataset(
            manifest_path=os.path.join(self.cfg.data, f"{split}.tsv"),
            sample_rate=options.sample_rate,
            max_sample_size=self.cfg.max_sample_size,
            min_sample_size=self.cfg.min_sample_size,
            pad=options.enable_padding,
            normalize=options.normalize,
            num_buckets=self.cfg.num_batch_buckets,
            seed=self.cfg.seed,
        )
        dataset.root_dir = str(root)
        if len(dataset) == 0:
            raise ValueError(
                f"{self.cfg.data}/{split}.tsv has no utterance of at least task.min_sample_size = {self.cfg.min_sample_size} samples; "
                "lower that limit"
            )
        self.datasets[split] = dataset
