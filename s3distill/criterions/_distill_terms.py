"""The options of `layer_distill` as the core's own dataclasses."""

from typing import Any

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
