"""What can be wrong between a CTC student, its teacher and `ctc_distill`, told before training starts."""

from typing import Any, Optional

from s3distill.criterions._distill_checks import (
    check_frames,
    check_gates,
    check_heads,
    check_shared_extractor,
    target_of,
)
from s3distill.encoder.ctc_teacher import CtcTeacher
from s3distill.models._student_parts import StudentParts


def check_ctc_options(cfg: Any) -> None:
    """Ranges of the options that have no dataclass of their own (`ValueError`)."""
    if not 0 <= cfg.alpha <= 1:
        raise ValueError(
            f"`criterion.alpha` is the share of the CTC loss and must be in [0, 1], but is {cfg.alpha}; 1 leaves the teacher's logits out, "
            "0 the labels"
        )
    if not cfg.hidden_weight >= 0:
        raise ValueError(
            f"`criterion.hidden_weight` must be at least 0, but is {cfg.hidden_weight}; 0 leaves hidden states out"
        )


def check_options_act(cfg: Any, defaults: Any) -> None:
    """Options of a term that has no weight are refused (`ValueError`)."""
    hidden = ("l1_weight", "l2_weight", "cosine_weight", "cosine_type", "layer_weights", "target_norm")
    idle = {
        "alpha=1 leaves the teacher's logits out": ("temperature", "blank_frames") if cfg.alpha == 1 else (),
        "blank_frames=all counts every frame": ("blank_threshold",) if str(cfg.blank_frames) == "all" else (),
        "hidden_weight=0 leaves hidden states out": hidden if cfg.hidden_weight == 0 else (),
    }
    for reason, names in idle.items():
        for name in names:
            value, default = getattr(cfg, name), getattr(defaults, name)
            if getattr(value, "value", value) != getattr(default, "value", default):
                raise ValueError(f"`criterion.{name}` is {value}, but criterion.{reason}; leave it at {default!r}")


def check_unlabelled(cfg: Any, subset: Optional[str]) -> None:
    """Audio without labels learns from the teacher, or from nothing (`ValueError`)."""
    if subset and cfg.alpha == 1 and cfg.hidden_weight == 0:
        raise ValueError(
            f"the utterances of task.unlabelled_subset={subset} learn from the teacher alone, but criterion.alpha=1 and hidden_weight=0 "
            "leave it out; pass a smaller criterion.alpha, or leave the subset out"
        )


def check_student(model: Any) -> None:
    """A model without heads and gates has another criterion."""
    if not isinstance(model, StudentParts) or not hasattr(model, "get_normalized_probs"):
        raise ValueError(
            f"criterion `ctc_distill` trains wav2vec_ctc_student, but the model is {type(model).__name__}; pass "
            "model._name=wav2vec_ctc_student, or criterion._name=ctc (layer_distill for ssl_student)"
        )


def check_ctc_distillation(model: Any, teacher: Optional[CtcTeacher], cfg: Any, layer_weights: Any) -> None:
    """Heads, frames, teacher and gates fit each other and the weights.

    Args:
        cfg: options of `ctc_distill`.
        layer_weights: one per matched layer, or None.
    Raises:
        ValueError: with the option to change.
    """
    if cfg.hidden_weight == 0 and model.heads is not None:
        raise ValueError(
            "`model.distill_layers` must be empty where criterion.hidden_weight is 0: its prediction heads would learn nothing; pass e.g. "
            "criterion.hidden_weight=1, or leave the layers out"
        )
    if cfg.hidden_weight > 0 and model.heads is None:
        raise ValueError(
            "`criterion.hidden_weight` needs prediction heads: `model.distill_layers` must name the layers to match, e.g. '4,8,12', but "
            "is empty"
        )
    if teacher is None:
        if cfg.alpha < 1 or cfg.hidden_weight > 0 or model.cfg.shares_extractor:
            raise ValueError(
                f"`task.teacher_path` must name the teacher, but is empty (criterion.alpha={cfg.alpha}, hidden_weight="
                f"{cfg.hidden_weight}, model.shares_extractor={model.cfg.shares_extractor}); pass it, or criterion.alpha=1 to train "
                "without one"
            )
    else:
        if cfg.hidden_weight > 0:
            check_heads(model, [teacher], True, layer_weights)
            check_frames(model, teacher, False)
        if cfg.alpha < 1:
            teacher.check_head()
            _check_logit_frames(model, teacher)
        check_shared_extractor(model, [teacher])
    check_gates(model, target_of(model, cfg.target_sparsity, cfg.target_rtf))


def _check_logit_frames(model: Any, teacher: CtcTeacher) -> None:
    student, frames = model.config, teacher.config.frame_convs
    if student.frame_convs != frames:
        raise ValueError(
            f"logits are matched frame by frame, but the student has one frame per {student.frame_stride} samples and {teacher.name} one "
            f"per {teacher.config.frame_stride}, (kernel, stride) {list(student.frame_convs)} and {list(frames)}; take a student with the "
            "teacher's convolutions and time_reduction=1, or criterion.alpha=1"
        )
