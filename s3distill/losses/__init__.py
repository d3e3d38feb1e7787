"""Losses on tensors; every one counts valid frames only."""

from s3distill.losses.hidden_state import COSINES, HiddenStateLoss, LossWeights, hidden_state_loss

__all__ = ["COSINES", "HiddenStateLoss", "LossWeights", "hidden_state_loss"]
