"""All terms of a distillation from one teacher, put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from s3distill.losses.hidden_state import HiddenStateLoss, LossWeights, hidden_state_loss
from s3distill.losses.masked import FrameWeights, MaskedLoss, masked_hidden_state_loss
from s3distill.losses.precision import at_least_float32
from s3distill.losses.target_norm import normalize_target
from s3distill.losses.temporal_relation import Pairs, TemporalWeights, temporal_relation_loss


@dataclass(frozen=True)
class DistillationTerms:
    """What a distillation consists of.

    Args:
        hidden_states: weights of the distance between predictions and targets; None = no heads, no such distance.
        frames: weights of masked and unmasked frames; None = the student hears everything, every frame counts 1.
        temporal: weights of temporal relations, which are free of heads, of `target_norm` and of ``frames``: they count
            every valid frame, and their targets are what the teacher makes of the clean audio.
        target_norm: how targets are normalised, see `normalize_target`.
    Raises:
        ValueError: nothing has a weight.
    """

    hidden_states: LossWeights | None = field(default_factory=LossWeights)
    frames: FrameWeights | None = None
    temporal: TemporalWeights = field(default_factory=TemporalWeights)
    target_norm: str = "none"

    def __post_init__(self) -> None:
        if self.hidden_states is None and not self.temporal.active:
            raise ValueError("a distillation needs a loss: give hidden states or temporal relations a positive weight")


class TeacherStates(NamedTuple):
    """One teacher's hidden states by layer, [B, T, C] each.

    Attributes:
        clean: of the clean audio.
        masked: of the audio that the student hears, as targets at unmasked frames; None = ``clean`` there too.
    """

    clean: Mapping[int, Tensor]
    masked: Mapping[int, Tensor] | None = None


class DistillationLoss(NamedTuple):
    """Sums over frames; divide by ``num_frames`` for means.

    Attributes:
        total: differentiable.
        parts: what to log, detached: ``loss_layerN`` (the loss of teacher layer N, without its layer weight); ``l1``,
            ``l2``, ``cosine`` (over all layers, unweighted); with masks ``loss_masked`` and ``loss_unmasked`` (weighted);
            ``temporal_layer``, ``temporal_intra``, ``temporal_inter`` (unweighted) where they have a weight.
        num_frames: frames that count.
    """

    total: Tensor
    parts: dict[str, Tensor]
    num_frames: int


def distillation_loss(
    terms: DistillationTerms,
    pairs: Pairs,
    predictions: Sequence[Tensor],
    teacher: TeacherStates,
    padding_mask: Tensor | None = None,
    masked: Tensor | None = None,
    student_states: Mapping[int, Tensor] | None = None,
    temporal_pairs: Pairs = (),
    layer_weights: Sequence[float] | None = None,
) -> DistillationLoss:
    """sum_j w_j L(p_j, norm(h_(t_j)))  +  N * (mean over valid frames of the temporal relations).

    L is `hidden_state_loss`, or `masked_hidden_state_loss` with ``terms.frames``; N counts the frames of L, so that
    temporal relations weigh the same whichever frames count there.

    Args:
        pairs: (student layer, teacher layer) per prediction.
        predictions: p_j, [B, T, C_teacher] each.
        padding_mask: [B, T] bool, True = padding, or None.
        masked: [B, T] bool, what is masked in the student's input; needed with ``terms.frames``.
        student_states: hidden states by layer, [B, T, C_student], and
        temporal_pairs: (student layer, teacher layer), for temporal relations.
        layer_weights: w_j, one per pair; None = 1 each.
    """
    parts: dict[str, Tensor] = {}
    any_state = next(iter(teacher.clean.values()))
    total = at_least_float32(any_state.new_zeros(()))
    num_frames = None
    for j, prediction in enumerate(predictions if terms.hidden_states is not None else ()):
        layer, weight = pairs[j][1], 1.0 if layer_weights is None else layer_weights[j]
        target = normalize_target(teacher.clean[layer], padding_mask, terms.target_norm)
        loss: HiddenStateLoss | MaskedLoss
        if terms.frames is None:
            loss = hidden_state_loss(prediction, target, padding_mask, terms.hidden_states)
        else:
            assert masked is not None, "masked and unmasked frames need a mask"
            other = None
            if teacher.masked is not None:
                other = normalize_target(teacher.masked[layer], padding_mask, terms.target_norm)
            loss = parted = masked_hidden_state_loss(
                prediction, target, masked, padding_mask, terms.hidden_states, terms.frames, other
            )
            _add(parts, {"loss_masked": weight * parted.masked, "loss_unmasked": weight * parted.unmasked})
        num_frames = loss.num_frames
        total = total + loss.total * weight
        parts[f"loss_layer{layer}"] = loss.total.detach()
        _add(parts, {"l1": loss.l1, "l2": loss.l2, "cosine": loss.cos})
    if terms.temporal.active:
        assert student_states is not None, "temporal relations need the student's hidden states"
        relation = temporal_relation_loss(student_states, teacher.clean, temporal_pairs, padding_mask, terms.temporal)
        num_frames = relation.num_frames if num_frames is None else num_frames
        share = num_frames / max(relation.num_frames, 1)
        total = total + relation.total * share
        values = {"layer": relation.layer, "intra": relation.intra, "inter": relation.inter}
        weights = terms.temporal.by_name
        _add(parts, {f"temporal_{name}": value * share for name, value in values.items() if weights[name] > 0})
    assert num_frames is not None
    return DistillationLoss(total, parts, num_frames)


def _add(parts: dict[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        parts[name] = parts[name] + value if name in parts else value
