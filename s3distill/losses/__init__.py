"""Losses on tensors; every one counts valid frames, or utterances, only."""

from s3distill.losses.distillation import DistillationLoss, DistillationTerms, TeacherStates, distillation_loss
from s3distill.losses.hidden_state import COSINES, HiddenStateLoss, LossWeights, hidden_state_loss
from s3distill.losses.logits import BLANK_FRAMES, LogitLoss, LogitTerms, logit_distillation
from s3distill.losses.masked import FrameWeights, MaskedLoss, masked_hidden_state_loss
from s3distill.losses.target_norm import TARGET_NORMS, normalize_target
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
    "TeacherStates",
    "TemporalRelationLoss",
    "TemporalWeights",
    "distillation_loss",
    "hidden_state_loss",
    "label_loss",
    "logit_distillation",
    "masked_hidden_state_loss",
    "normalize_target",
    "temporal_relation_loss",
]
