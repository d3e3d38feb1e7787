"""What can be wrong between a student with a decoder, its teacher and their criterion, told before training starts."""

import math
from typing import Any

from s3distill.losses.word_level import check_label_smoothing, check_temperature
from s3distill.models.wav2vec_seq2seq_student import Wav2VecSeq2SeqStudent
from s3distill.tasks.audio_seq2seq_distill import AudioSeq2SeqDistillTask


def check_options(cfg: Any) -> None:
    """Options of `seq2seq_distill` by themselves (`ValueError`)."""
    if not 0 <= cfg.alpha <= 1:
        raise ValueError(
            f"`criterion.alpha` must be in [0, 1], the weight of the labels, but is {cfg.alpha}; 0.5 gives label and teacher the same"
        )
    check_temperature(cfg.temperature)
    check_label_smoothing(cfg.label_smoothing)
    for name in ("seq_beta", "encoder_weight"):
        if not 0 <= getattr(cfg, name) < math.inf:
            raise ValueError(f"`criterion.{name}` must be at least 0 and finite, but is {getattr(cfg, name)}")


def check_teacher(cfg: Any, word_level: bool, model: Any, task: Any) -> None:
    """Task, student and teacher have what the criterion asks for (`ValueError`); reads the teacher where it is needed."""
    if not isinstance(task, AudioSeq2SeqDistillTask):
        raise ValueError(
            f"criterion seq2seq_distill needs task._name=audio_seq2seq_distill, but the task is {type(task).__name__}"
        )
    if not hasattr(model, "decoder"):
        raise ValueError(
            f"criterion seq2seq_distill needs a model with a decoder, but the model is {type(model).__name__}; pass "
            "model._name=wav2vec_seq2seq_student, or criterion._name=ctc_distill for a CTC model"
        )
    _check_nbest(cfg, word_level, model, task)
    if word_level and cfg.alpha < 1:
        task.teacher  # noqa: B018  reads the file, whose faults are told now
    if cfg.encoder_weight > 0:
        _check_encoders(model, task.teacher)


def _check_nbest(cfg: Any, word_level: bool, model: Any, task: Any) -> None:
    sequence_level = not word_level and cfg.alpha < 1
    if sequence_level and not task.cfg.nbest:
        raise ValueError(
            f"`criterion.seq_kd`={getattr(cfg.seq_kd, 'value', cfg.seq_kd)} trains on hypotheses, but task.nbest is false; pass "
            "task.nbest=true, with SPLIT.nbest.jsonl beside the manifest or in task.nbest_dir"
        )
    if task.cfg.nbest and not sequence_level:
        raise ValueError(
            "`task.nbest` reads hypotheses that nothing would be trained on, with criterion.seq_kd=none or criterion.alpha=1; pass "
            "criterion.seq_kd=ranked and a smaller criterion.alpha, or task.nbest=false"
        )
    if sequence_level and not isinstance(model, Wav2VecSeq2SeqStudent):
        raise ValueError(
            "sequence-level distillation reads several texts per utterance, which model._name=wav2vec_seq2seq_student can, but the "
            f"model is {type(model).__name__}; pass that one, or criterion.seq_kd=none"
        )


def _check_encoders(model: Any, teacher: Any) -> None:
    """The two encoders' outputs can be compared frame by frame and channel by channel."""
    if not isinstance(model, Wav2VecSeq2SeqStudent):
        raise ValueError(
            "`criterion.encoder_weight` needs model._name=wav2vec_seq2seq_student, whose encoder's output it sees, but the model is "
            f"{type(model).__name__}; pass that one, or 0"
        )
    width = model.cfg.decoder_embed_dim
    if width != teacher.decoder_dim:
        raise ValueError(
            f"`criterion.encoder_weight` compares what the two decoders attend to: model.decoder_embed_dim must be {teacher.decoder_dim}, "
            f"as of {teacher.name}, but is {width}; pass that, or criterion.encoder_weight=0"
        )
    config = model.encoder.w2v_model.config
    if config.frame_convs != teacher.config.frame_convs:
        raise ValueError(
            "`criterion.encoder_weight` compares frames: both encoders must cut audio into the same ones, but the student has one "
            f"per {config.frame_stride} samples and {teacher.name} one per {teacher.config.frame_stride}, or by other convolutions; pass 0"
        )
