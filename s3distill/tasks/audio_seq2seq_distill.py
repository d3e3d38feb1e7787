"""`audio_seq2seq_distill`: labelled audio, a frozen teacher with a decoder, and what teachers heard as n-best lists."""

# no `from __future__ import annotations`: fairseq reads the types of config fields
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional

from fairseq.dataclass import ChoiceEnum
from fairseq.tasks import register_task
from omegaconf import II

from s3distill.data.manifest import read_dictionary, read_manifest
from s3distill.data.nbest import ENDING, NbestEntry, read_nbest
from s3distill.encoder.teacher import DTYPES
from s3distill.tasks._diverged import require_finite_parameters
from s3distill.tasks._seq2seq_teacher import Seq2SeqTeacher
from s3distill.tasks._texts import TextDataset
from s3distill.tasks.audio_ctc import AudioCtcConfig, AudioCtcTask


@dataclass
class AudioSeq2SeqDistillConfig(AudioCtcConfig):
    """The options of `audio_ctc`, a teacher and its hypotheses."""

    autoregressive: bool = field(default=True, metadata={"help": "must stay true: the student has a decoder"})
    teacher_path: Optional[str] = field(
        default=None,
        metadata={
            "help": "checkpoint of the teacher, wav2vec_seq2seq or wav2vec_seq2seq_student, of the same dictionary"
        },
    )
    teacher_dtype: ChoiceEnum(list(DTYPES)) = field(  # type: ignore[valid-type]
        default="float32", metadata={"help": "precision that the teacher runs in"}
    )
    nbest: bool = field(
        default=False,
        metadata={
            "help": "train on the hypotheses of SPLIT.nbest.jsonl too, see criterion.seq_kd; training splits only"
        },
    )
    nbest_dir: Optional[str] = field(
        default=None, metadata={"help": "folder of SPLIT.nbest.jsonl; empty: beside the manifest, task.data"}
    )
    train_subset: str = II("dataset.train_subset")


@register_task("audio_seq2seq_distill", dataclass=AudioSeq2SeqDistillConfig)
class AudioSeq2SeqDistillTask(AudioCtcTask):
    """`audio_ctc` for students with a decoder. The teacher is read when something first asks for it, and never saved."""

    cfg: AudioSeq2SeqDistillConfig

    def __init__(self, cfg: AudioSeq2SeqDistillConfig) -> None:
        _check(cfg)
        super().__init__(cfg)
        self._teacher: Optional[Seq2SeqTeacher] = None
        self._model: Any = None

    @property
    def teacher(self) -> Seq2SeqTeacher:
        """The frozen model of `task.teacher_path`."""
        if self._teacher is None:
            if not self.cfg.teacher_path:
                raise ValueError(
                    "`task.teacher_path` must name a trained model with a decoder, but is empty; or pass criterion.alpha=1 and "
                    "criterion.encoder_weight=0 to train on the labels alone"
                )
            teacher = Seq2SeqTeacher(self.cfg.teacher_path, str(self.cfg.teacher_dtype), self)
            if teacher.normalize != bool(self.cfg.normalize):
                raise ValueError(
                    f"`task.normalize` must be what the teacher was trained with: {self.cfg.teacher_path} has "
                    f"normalize={teacher.normalize}, but the task has {bool(self.cfg.normalize)}; pass "
                    f"task.normalize={str(teacher.normalize).lower()}"
                )
            self._teacher = teacher
        return self._teacher

    def build_model(self, model_cfg: Any, from_checkpoint: bool = False) -> Any:
        self._model = super().build_model(model_cfg, from_checkpoint)
        return self._model

    def build_criterion(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        criterion = super().build_criterion(cfg, from_checkpoint)
        if self._model is not None and hasattr(criterion, "check"):  # fairseq builds the model first
            criterion.check(self._model, self)
        return criterion

    def state_dict(self) -> Dict[str, Any]:
        """fairseq asks for it when it saves: a student that diverged is not written over a good one."""
        if self._model is not None:
            require_finite_parameters(self._model)
        return dict(super().state_dict())

    def load_dataset(self, split: str, task_cfg: Any = None, **kwargs: Any) -> None:
        super().load_dataset(split, task_cfg, **kwargs)
        hypotheses = None
        if self.cfg.nbest and split in self.cfg.train_subset.split(","):
            hypotheses = self._read_nbest(split)
        self.datasets[split] = TextDataset(self.datasets[split], self.target_dictionary, hypotheses)

    def _read_nbest(self, split: str) -> List[NbestEntry]:
        """The n-best lists of the dataset's utterances (too short ones were skipped)."""
        manifest = read_manifest(Path(self.cfg.data) / f"{split}.tsv")
        path = Path(self.cfg.nbest_dir or self.cfg.data) / f"{split}.{ENDING}"
        if not path.is_file():
            raise FileNotFoundError(
                f"`task.nbest` trains on hypotheses, but there is no file {path}; decode {split} with the teacher (fairseq-generate "
                "--beam 5 --nbest 3 --scoring s3_wer --results-path DIR) and pass task.nbest_dir=DIR"
            )
        dictionary = Path(self.cfg.target_dictionary or self.cfg.data) / f"dict.{self.cfg.labels}.txt"
        entries = read_nbest(path, manifest, read_dictionary(dictionary))
        dataset = self.datasets[split]
        while hasattr(dataset, "dataset"):
            dataset = dataset.dataset
        skipped = getattr(dataset, "skipped_indices", set())
        return [entry for i, entry in enumerate(entries) if i not in skipped]


def _check(cfg: AudioSeq2SeqDistillConfig) -> None:
    if not cfg.autoregressive:
        raise ValueError(
            "`task.autoregressive` must stay true in audio_seq2seq_distill, whose students have a decoder; leave it out, or take "
            "task._name=audio_ctc"
        )
    if cfg.multi_corpus_keys is not None:
        raise ValueError(
            f"`task.multi_corpus_keys` is not supported by audio_seq2seq_distill and must stay empty, but is {cfg.multi_corpus_keys!r}; "
            "prepare one manifest of the wanted utterances instead"
        )
    if cfg.nbest_dir and not cfg.nbest:
        raise ValueError("`task.nbest_dir` is about task.nbest, which is false; pass task.nbest=true, or leave it out")
