"""The options of distillations as the core's own dataclasses, and a loss that must be finite."""

from typing import Any

import torch
from torch import Tensor

from s3distill.losses import DistillationTerms, FrameWeights, LossWeights, TemporalWeights


def build_terms(cfg: Any) -> DistillationTerms:
    """The losses of the options."""
    temporal = TemporalWeights(
        cfg.temporal_layer_weight, cfg.temporal_intra_weight, cfg.temporal_inter_weight, str(cfg.temporal_norm)
    )
    weights = (cfg.l1_weight, cfg.l2_weight, cfg.cosine_weight)
    # LossWeights refuses three zeros, which make sense beside temporal relations only
    predicted = None if temporal.active and not any(weights) else LossWeights(*weights, str(cfg.cosine_type))
    frames = FrameWeights(cfg.masked_weight, cfg.unmasked_weight) if cfg.mask_student else None
    return DistillationTerms(predicted, frames, temporal, str(cfg.target_norm))


def require_finite(loss: Tensor, model: Any, sample: Any, remedy: str = "") -> None:
    """Stops a run whose loss is no number, before an optimizer has seen it (`RuntimeError`)."""
    if not torch.isfinite(loss):
        raise RuntimeError(
            f"the loss became {loss.item()} at update {model.num_updates} (utterances {sample['id'].tolist()[:8]}): {remedy}lower "
            "optimization.lr, train in float32 or bf16 instead of fp16, or check these utterances with `s3distill check`; the last "
            "checkpoint is untouched"
        )


def parse_layer_weights(text: str) -> list[float]:
    weights = []
    for item in text.split(","):
        try:
            weights.append(float(item))
        except ValueError as error:
            raise ValueError(
                f"`criterion.layer_weights` must read like '0.1,0.1,1', but {item.strip()!r} is no number"
            ) from error
    return weights
