"""`audio_ctc_distill`: labelled audio and a frozen teacher, for CTC students that are distilled."""

# no `from __future__ import annotations`: fairseq reads the types of config fields
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, List, Optional

from fairseq.dataclass import ChoiceEnum
from fairseq.tasks import register_task
from omegaconf import II

from s3distill import compat
from s3distill.data.manifest import read_dictionary
from s3distill.encoder.checkpoint import parse_checkpoint
from s3distill.encoder.ctc_head import SPECIAL_SYMBOLS
from s3distill.encoder.ctc_teacher import CtcTeacher
from s3distill.encoder.symbols import SYMBOL_MAPS, SymbolMap, match_symbols
from s3distill.encoder.teacher import DTYPES
from s3distill.masks.state import baked
from s3distill.models._student_parts import keep_filled
from s3distill.tasks._audio import SeededCropDataset, check_split
from s3distill.tasks._diverged import require_finite_parameters
from s3distill.tasks._nbest import with_nbest
from s3distill.tasks._unlabelled import MixedLabelsDataset, check_unlabelled_options
from s3distill.tasks.audio_ctc import AudioCtcConfig, AudioCtcTask

logger = logging.getLogger(__name__)


@dataclass
class AudioCtcDistillConfig(AudioCtcConfig):
    """The options of `audio_ctc`, and the teacher."""

    teacher_path: Optional[str] = field(
        default=None,
        metadata={"help": "checkpoint of the teacher: fine-tuned with CTC, or pre-trained for its hidden states alone"},
    )
    teacher_dtype: ChoiceEnum(list(DTYPES)) = field(  # type: ignore[valid-type]
        default="float32", metadata={"help": "precision that the teacher runs in"}
    )
    teacher_dictionary: Optional[str] = field(
        default=None,
        metadata={"help": "dictionary that the teacher was trained with (dict.ltr.txt), where its checkpoint has none"},
    )
    symbol_map: ChoiceEnum(list(SYMBOL_MAPS)) = field(  # type: ignore[valid-type]
        default="exact",
        metadata={
            "help": "exact: teacher and student have the same symbols, in whatever order; by_symbol: those in common are matched, the "
            "probability of the others is dropped and the rest renormalised"
        },
    )
    nbest: bool = field(
        default=False,
        metadata={
            "help": "read SPLIT.nbest.jsonl of the training split, as `s3distill pseudo-label --nbest K` writes it, for criterion.seq_kd"
        },
    )
    unlabelled_subset: Optional[str] = field(
        default=None,
        metadata={"help": "manifest (in task.data) of audio without labels that the training split is mixed with"},
    )
    unlabelled_weight: float = field(
        default=0.5, metadata={"help": "of unlabelled_subset: its share of the utterances of every epoch"}
    )
    train_subset: str = II("dataset.train_subset")


@register_task("audio_ctc_distill", dataclass=AudioCtcDistillConfig)
class AudioCtcDistillTask(AudioCtcTask):
    """`audio_ctc` with a teacher, which is read when something first asks for it and is in no checkpoint of a student."""

    cfg: AudioCtcDistillConfig
    num_teachers = 1

    def __init__(self, cfg: AudioCtcDistillConfig) -> None:
        check_unlabelled_options(cfg)
        super().__init__(cfg)
        self._teachers: List[CtcTeacher] = []
        self._model: Any = None

    @property
    def teachers(self) -> List[CtcTeacher]:
        """The frozen teacher of `task.teacher_path`, or nothing where that is empty."""
        path = self.cfg.teacher_path
        if path and not self._teachers:
            parsed = baked(parse_checkpoint(compat.load_checkpoint(path), path), path)
            if parsed.normalize != bool(self.cfg.normalize):
                raise ValueError(
                    f"`task.normalize` must be what the teacher was trained with: {path} has normalize={parsed.normalize}, but the task "
                    f"has {bool(self.cfg.normalize)}; pass task.normalize={str(parsed.normalize).lower()}"
                )
            teacher = CtcTeacher(parsed, str(self.cfg.teacher_dtype), f"teacher {path}")
            logger.info(
                "teacher %s: %d layers, width %d, %s, %d outputs",
                *(path, teacher.config.num_layers, teacher.config.embed_dim, teacher.dtype, teacher.num_outputs),
            )
            self._teachers = [teacher]
        return self._teachers

    def match_symbols(self) -> SymbolMap:
        """Which outputs of teacher and student are the same symbol.

        Raises:
            ValueError: the teacher has no dictionary, or one that does not match, see `symbols.match_symbols`.
        """
        teacher = self.teachers[0]
        symbols = self._teacher_symbols(teacher)
        if len(symbols) != teacher.num_outputs:
            raise ValueError(
                f"the dictionary of {teacher.name} must name its head's {teacher.num_outputs} outputs, but has {len(symbols)} symbols; "
                "pass the one that it was trained with as task.teacher_dictionary"
            )
        found = match_symbols(symbols, self.target_dictionary.symbols, str(self.cfg.symbol_map), teacher.name)
        if self.blank_symbol not in found.symbols:
            raise ValueError(
                f"the blank, {self.blank_symbol}, must be a symbol of teacher and student, but {teacher.name} has none"
            )
        logger.info(
            "%d symbols of %s and the student's %d match", len(found.symbols), teacher.name, len(self.target_dictionary)
        )
        return found

    def _teacher_symbols(self, teacher: CtcTeacher) -> List[str]:
        path = self.cfg.teacher_dictionary
        given = [*SPECIAL_SYMBOLS, *read_dictionary(Path(path))] if path else None
        if teacher.symbols is None and given is None:
            raise ValueError(
                f"{teacher.name} carries no dictionary, so that nobody knows what its {teacher.num_outputs} outputs mean; pass the one "
                "that it was trained with as task.teacher_dictionary=dict.ltr.txt"
            )
        if teacher.symbols is not None and given is not None and given != list(teacher.symbols):
            raise ValueError(
                f"`task.teacher_dictionary` is for teachers that carry none, but {teacher.name} has one and {path} is another; leave it out"
            )
        return given or list(teacher.symbols or ())

    def build_model(self, model_cfg: Any, from_checkpoint: bool = False) -> Any:
        self._model = model = super().build_model(model_cfg, from_checkpoint)
        keep_filled(model_cfg, model.cfg)
        return model

    def build_criterion(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        criterion = super().build_criterion(cfg, from_checkpoint)
        if self._model is not None and hasattr(criterion, "check_model"):  # fairseq builds the model first
            criterion.check_model(self._model, self.teachers)
        return criterion

    def load_dataset(self, split: str, task_cfg: Any = None, **kwargs: Any) -> None:
        super().load_dataset(split, task_cfg, **kwargs)
        if self.cfg.nbest and split in str(self.cfg.train_subset).split(","):
            manifest = Path(self.cfg.data) / f"{split}.tsv"
            self.datasets[split] = with_nbest(self.datasets[split], manifest, self.target_dictionary)
        if self.cfg.unlabelled_subset and split in str(self.cfg.train_subset).split(","):
            self.datasets[split] = self._with_unlabelled(self.datasets[split])

    def _with_unlabelled(self, labelled: Any) -> MixedLabelsDataset:
        cfg, name = self.cfg, str(self.cfg.unlabelled_subset)
        root = check_split(cfg.data, name, None)
        unlabelled = SeededCropDataset(
            manifest_path=str(Path(cfg.data) / f"{name}.tsv"),
            sample_rate=cfg.sample_rate,
            max_sample_size=cfg.max_sample_size,
            min_sample_size=cfg.min_sample_size,
            pad=True,
            normalize=cfg.normalize,
            seed=cfg.seed,
        )
        unlabelled.root_dir = str(root)
        if len(unlabelled) == 0:
            raise ValueError(
                f"{cfg.data}/{name}.tsv has no utterance of at least task.min_sample_size = {cfg.min_sample_size} samples; lower that limit"
            )
        mixed = MixedLabelsDataset(labelled, unlabelled, cfg.unlabelled_weight, cfg.seed, self.target_dictionary.pad())
        logger.info(
            "every epoch: %d labelled utterances and %d of the %d of %s without labels",
            *(len(labelled), mixed.num_drawn, len(unlabelled), name),
        )
        return mixed

    def state_dict(self) -> dict[str, Any]:
        """fairseq asks for it when it saves: a student that diverged is not written over a good one."""
        if self._model is not None:
            require_finite_parameters(self._model)
        return dict(super().state_dict())
