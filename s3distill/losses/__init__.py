"""Losses on tensors; every one counts valid frames, or utterances, only."""

from s3distill.losses.confidence import RelativeThreshold, check_threshold, confident_frames, utterance_confidence
from s3distill.losses.distillation import DistillationLoss, DistillationTerms, TeacherStates, distillation_loss
from s3distill.losses.ewc import check_fisher_fits, ewc_penalty
from s3distill.losses.hidden_state import COSINES, HiddenStateLoss, LossWeights, hidden_state_loss
from s3distill.losses.logits import BLANK_FRAMES, LogitLoss, LogitTerms, logit_distillation
from s3distill.losses.masked import FrameWeights, MaskedLoss, masked_hidden_state_loss
from s3distill.losses.mixup import draw_mixup_coefficients, mix_waveforms
from s3distill.losses.target_norm import TARGET_NORMS, normalize_target
from s3distill.losses.task_alignment import TaskAlignmentLoss, task_alignment_loss
from s3distill.losses.temporal_relation import (
    TEMPORAL_NORMS,
    TemporalRelationLoss,
    TemporalWeights,
    temporal_relation_loss,
)
from s3distill.losses.utterance_labels import LabelLoss, label_loss

__all__ = [
    "BLANK_FRAMES",
    "COSINES",
    "TARGET_NORMS",
    "TEMPORAL_NORMS",
    "DistillationLoss",
    "DistillationTerms",
    "FrameWeights",
    "HiddenStateLoss",
    "LabelLoss",
    "LogitLoss",
    "LogitTerms",
    "LossWeights",
    "MaskedLoss",
    "RelativeThreshold",
    "TaskAlignmentLoss",
    "TeacherStates",
    "TemporalRelationLoss",
    "TemporalWeights",
    "check_fisher_fits",
    "check_threshold",
    "confident_frames",
    "distillation_loss",
    "draw_mixup_coefficients",
    "ewc_penalty",
    "hidden_state_loss",
    "label_loss",
    "logit_distillation",
    "masked_hidden_state_loss",
    "mix_waveforms",
    "normalize_target",
    "task_alignment_loss",
    "temporal_relation_loss",
    "utterance_confidence",
]
