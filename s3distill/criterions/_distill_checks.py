"""What can be wrong between student, teachers and criterion of a distillation, told before training starts."""

from typing import Any, Optional, Sequence

from s3distill.encoder.teacher import Teacher


def check_heads(
    model: Any, teachers: Sequence[Teacher], wanted: bool, layer_weights: Optional[Sequence[float]]
) -> None:
    """One set of prediction heads per teacher, for layers it has and of its width; none where nothing is predicted."""
    if not wanted:
        if model.heads is not None:
            raise ValueError(
                "`model.distill_layers` must be empty where criterion.l1_weight, l2_weight and cosine_weight are all 0: its prediction "
                "heads would learn nothing; name the layers of temporal relations in criterion.temporal_layers"
            )
        return
    if model.heads is None:
        raise ValueError("`model.distill_layers` must name the layers to match, e.g. '0,4,8,12', but is empty")
    by_teacher = model.heads.by_teacher
    if len(by_teacher) != len(teachers):
        raise ValueError(
            f"`model.extra_teacher_dims` must have one width per further teacher ({len(teachers) - 1}), but has {len(by_teacher) - 1}; "
            "leave it out"
        )
    for i, (heads, teacher) in enumerate(zip(by_teacher, teachers, strict=True)):
        teacher.check_layers([layer for _, layer in heads.pairs])
        split = [f"{s}:{t}" for s, t in heads.config.pairs if s != t]
        if heads.config.mode == "predlayer" and split:
            raise ValueError(
                "`model.distill_layers` names layers of the teacher where model.head_mode=predlayer, since all heads read the student's "
                f"last layer, but has {', '.join(split)}; leave the student's layers out, or take head_mode=layer2layer"
            )
        if heads.config.teacher_dim != teacher.config.embed_dim:
            option = "model.teacher_dim" if i == 0 else "model.extra_teacher_dims"
            raise ValueError(
                f"`{option}` must be the width of {teacher.name}, {teacher.config.embed_dim}, but is "
                f"{heads.config.teacher_dim}; leave it out"
            )
        if layer_weights is not None and len(layer_weights) != len(heads.pairs):
            raise ValueError(
                f"`criterion.layer_weights` must have one weight per matched layer ({len(heads.pairs)}), but has {len(layer_weights)}"
            )


def check_frames(model: Any, teacher: Teacher, temporal: bool) -> None:
    """Student and teacher cut audio into the same frames, or prediction heads undo the student's time reduction."""
    student, frames = model.config, teacher.config.frame_convs
    if student.frame_convs == frames:
        return
    if student.time_reduction > 1 and student.frame_convs[:-1] == frames and model.heads is not None and not temporal:
        return
    if student.time_reduction > 1 and student.frame_convs[:-1] == frames:
        raise ValueError(
            f"student and teacher must have the same frames, but model.time_reduction={student.time_reduction} gives the student one "
            f"per {student.frame_stride} samples, and {teacher.name} has one per {teacher.config.frame_stride}; take time_reduction=1, or "
            "prediction heads (model.distill_layers), which bring the student's frames back to the teacher's, without temporal relations"
        )
    raise ValueError(
        f"student and teacher must cut audio into the same frames, but the student has one per {student.frame_stride} samples "
        f"and {teacher.name} one per {teacher.config.frame_stride}, (kernel, stride) {list(student.frame_convs)} and {list(frames)}; "
        "take a student with the teacher's convolutions"
    )


def check_masks(model: Any, mask_student: bool, unmasked_target: str, unmasked_weight: float) -> None:
    """Masks are asked for by the criterion and drawn by the model's options: both or neither."""
    masking = model.masking
    if masking.mask_channel_prob > 0 or (masking.mask_prob > 0 and not mask_student):
        raise ValueError(
            "`model.mask_prob` and `model.mask_channel_prob` act in fine-tuning only: teacher and student of a distillation hear the "
            "same audio; leave them at 0, or mask frames of the student's audio with criterion.mask_student=true and model.mask_prob"
        )
    if mask_student and masking.mask_prob <= 0:
        raise ValueError(
            f"`criterion.mask_student` needs masks: `model.mask_prob` must be positive, but is {masking.mask_prob}; pass e.g. "
            "model.mask_prob=0.65 model.mask_length=10"
        )
    if unmasked_target == "masked" and not (mask_student and unmasked_weight > 0):
        raise ValueError(
            "`criterion.unmasked_target=masked` acts at unmasked frames of masked audio only; pass criterion.mask_student=true and a "
            "positive criterion.unmasked_weight, or leave it at clean"
        )


def check_without_heads(cfg: Any) -> None:
    """Options of the distance between predictions and targets are refused where there are no predictions."""
    defaults = {
        "masked_weight": 1.0,
        "unmasked_weight": 0.0,
        "unmasked_target": "clean",
        "target_norm": "none",
        "layer_weights": "",
    }
    for name, default in defaults.items():
        value = getattr(cfg, name)
        value = getattr(value, "value", value)
        if value != default:
            raise ValueError(
                f"`criterion.{name}` is about prediction heads, but is {value} where criterion.l1_weight, l2_weight and cosine_weight are "
                f"all 0, so that there are none; leave it at {default!r}"
            )


def check_temporal_layers(model: Any, teacher: Teacher, pairs: Sequence[tuple[int, int]]) -> None:
    """Both sides have the layers whose frames are compared."""
    lacking = [student for student, _ in pairs if not 0 <= student <= model.config.num_layers]
    if lacking:
        raise ValueError(
            f"`criterion.temporal_layers` must be within 0 to {model.config.num_layers}, the layers of the student, but include "
            f"{lacking}; correct it"
        )
    missing = [layer for _, layer in pairs if not 0 <= layer <= teacher.config.num_layers]
    if missing:
        raise ValueError(
            f"`criterion.temporal_layers` must be within 0 to {teacher.config.num_layers}, the layers of {teacher.name}, but include "
            f"{missing}; correct it"
        )


def target_of(model: Any, target_sparsity: float, target_rtf: float) -> float:
    """The target as a sparsity: what was asked for, or what is left of the reference's latency at ``target_rtf``.

    Raises:
        ValueError: both are given, or a real-time factor where size is not counted by latency.
    """
    if target_rtf == 0:
        return target_sparsity
    if target_sparsity > 0:
        raise ValueError(
            f"`criterion.target_sparsity` and `criterion.target_rtf` both say how small the student is to be, {target_sparsity} and "
            f"{target_rtf}; leave one at 0"
        )
    if model.gates is None or str(model.cfg.prune_measure) != "latency":
        raise ValueError(
            "`criterion.target_rtf` needs gates and a latency table; pass model.prune_units, model.prune_measure=latency and "
            "model.latency_table=table.json"
        )
    reference = model.cfg.reference_cost
    if not 0 < target_rtf <= reference:
        raise ValueError(
            f"`criterion.target_rtf` must be above 0 and at most that of the whole encoder, {reference:.4f} by the latency table, but "
            f"is {target_rtf}"
        )
    return 1 - target_rtf / reference


def check_gates(model: Any, target_sparsity: float) -> None:
    """The gates can learn, and can reach the target."""
    if model.gates is not None and "conv" in model.gates.units and model.training_config.feature_grad_mult <= 0:
        raise ValueError(
            "`model.feature_grad_mult` must be above 0 where conv channels have gates, which would learn from the size alone; raise it "
            "or take 'conv' out of model.prune_units"
        )
    if target_sparsity > 0:
        if model.gates is None:
            raise ValueError("`criterion.target_sparsity` needs gates; pass e.g. model.prune_units=[conv,head,ffn]")
        model.check_target_sparsity(target_sparsity)


def check_shared_extractor(model: Any, teachers: Sequence[Teacher]) -> None:
    """With `model.shares_extractor`, what the student's convolutions give is what the teacher's would give."""
    if not model.cfg.shares_extractor:
        return
    wrong = None
    if len(teachers) > 1:
        # with one teacher, task.normalize is what both were trained with: the task and the student's file see to it
        wrong = f"there are {len(teachers)} teachers, which have one each"
    elif model.gates is not None and "conv" in model.gates.units:
        wrong = "model.prune_units has conv, so that the student's channels close; take it out"
    elif model.gates is not None and "width" in model.gates.units and not model.config.project_features:
        wrong = "model.prune_units has width, whose channels are those of the last convolution here; take it out"
    elif model.training_config.feature_grad_mult != 0:
        wrong = f"model.feature_grad_mult is {model.training_config.feature_grad_mult}, so that the student's would change; pass 0"
    elif not teachers[0].has_extractor_of(model):
        wrong = f"the student's differ from those of {teachers[0].name}; start from them (model.student_path=${{task.teacher_path}})"
    if wrong:
        raise ValueError(
            f"`model.shares_extractor` runs the convolutions once for student and teacher, but {wrong}; or leave it at false"
        )
