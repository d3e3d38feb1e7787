"""What acts on an encoder in training only: dropouts, gradient scale, masks of SpecAugment."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingConfig:
    """What only training looks at: dropouts, LayerDrop, and how much of the gradient reaches the conv extractor."""

    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    dropout_input: float = 0.0
    layerdrop: float = 0.0
    feature_grad_mult: float = 1.0
    checkpoint_activations: bool = False


@dataclass(frozen=True)
class MaskConfig:
    """SpecAugment-style masks over time (learned `mask_emb`) and channels (zeros), with fairseq's option names."""

    mask_prob: float = 0.0
    mask_length: int = 10
    mask_selection: str = "static"
    mask_other: float = 0.0
    no_mask_overlap: bool = False
    mask_min_space: int = 1
    mask_channel_prob: float = 0.0
    mask_channel_length: int = 10
    mask_channel_selection: str = "static"
    mask_channel_other: float = 0.0
    no_mask_channel_overlap: bool = False
    mask_channel_min_space: int = 1
    mask_channel_before: bool = False
    require_same_masks: bool = True
    mask_dropout: float = 0.0
