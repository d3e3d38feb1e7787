"""Function matching: what student and teacher both hear, waveforms mixed and frames masked alike."""

# no `from __future__ import annotations`: fairseq reads the types of config fields
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from torch import Tensor

from s3distill.losses.mixup import draw_mixup_coefficients, mix_waveforms

TEACHER_MASKS = ("none", "same")

# what keeps the draws of an update and utterance apart, behind (seed, update, utterance)
_SHARES, _WHICH = 1, 2


@dataclass
class MatchingOptions(FairseqDataclass):
    """Function matching  (Beyer et al., 2022, "Knowledge distillation: A good teacher is patient and consistent")."""

    teacher_mask: ChoiceEnum(list(TEACHER_MASKS)) = field(  # type: ignore[valid-type]
        default="none",
        metadata={
            "help": "none: the teacher hears all frames, the student may have masks (model.apply_mask); same: time masks are drawn once "
            "and given to both"
        },
    )
    mixup_alpha: float = field(
        default=0.0,
        metadata={
            "help": "above 0: utterances are mixed with their neighbour in the batch, a x_i + (1 - a) x_j, a ~ Beta(mixup_alpha, "
            "mixup_alpha), for student and teacher alike; mixed ones have no labels; 0: no mixup"
        },
    )
    mixup_prob: float = field(default=1.0, metadata={"help": "share of the utterances that are mixed"})


class View(NamedTuple):
    """What student and teacher hear of a batch.

    Attributes:
        source: [B, S].
        masked: [B, T] bool, frames that are masked in both, or None: each has its own way.
        unmixed: [B] bool, utterances that are as they were, so that their labels hold; None: all.
    """

    source: Tensor
    masked: Optional[Tensor]
    unmixed: Optional[Tensor]


def check_matching_options(cfg: Any, alpha: float) -> None:
    """Ranges, and mixup beside labels.

    Args:
        cfg: `MatchingOptions`.
        alpha: weight of the labels.
    Raises:
        ValueError: with the option to change.
    """
    if not 0 <= cfg.mixup_alpha < math.inf:
        raise ValueError(
            f"`criterion.mixup_alpha` must be at least 0 and finite, but is {cfg.mixup_alpha}; 1 draws uniform shares, 0 mixes nothing"
        )
    if not 0 < cfg.mixup_prob <= 1:
        raise ValueError(
            f"`criterion.mixup_prob` must be in (0, 1], but is {cfg.mixup_prob}; criterion.mixup_alpha=0 mixes nothing"
        )
    if cfg.mixup_alpha == 0 and cfg.mixup_prob != 1:
        raise ValueError(
            f"`criterion.mixup_prob` is about mixup, but is {cfg.mixup_prob} where criterion.mixup_alpha is 0; leave it out, or pass e.g. "
            "criterion.mixup_alpha=1"
        )
    if cfg.mixup_alpha > 0 and cfg.mixup_prob == 1 and alpha > 0:
        raise ValueError(
            f"mixed utterances have no labels, and criterion.mixup_prob=1 mixes all of them, but criterion.alpha={alpha} weighs labels; "
            "pass criterion.alpha=0, or a smaller criterion.mixup_prob"
        )
    if cfg.mixup_alpha > 0 and alpha == 1:
        raise ValueError(
            "mixed utterances learn from the teacher's logits, but criterion.alpha=1 leaves them out; pass a smaller criterion.alpha"
        )


def check_shared_masks(model: Any, cfg: Any) -> None:
    """``teacher_mask=same`` needs masks that both can have (`ValueError`)."""
    if str(cfg.teacher_mask) != "same":
        return
    if not (model.cfg.apply_mask and model.masking.mask_prob > 0):
        raise ValueError(
            "`criterion.teacher_mask=same` shares the student's time masks with the teacher, but there are none (model.apply_mask="
            f"{model.cfg.apply_mask}, mask_prob={model.masking.mask_prob}); pass model.apply_mask=true model.mask_prob=0.65"
        )
    if model.masking.mask_channel_prob > 0:
        raise ValueError(
            f"`model.mask_channel_prob` is {model.masking.mask_channel_prob}, but criterion.teacher_mask=same shares time masks alone: "
            "channels of two models are not the same; pass model.mask_channel_prob=0"
        )


def view_of(cfg: Any, model: Any, sample: Any, normalize: bool) -> View:
    """The batch as it is in evaluation; in training mixed and masked as the options say.

    Seed, update and utterance decide every draw, so that a resumed run repeats them.

    Args:
        cfg: `MatchingOptions`.
        normalize: `task.normalize`, of mixed waveforms.
    """
    source, padding_mask = sample["net_input"]["source"], sample["net_input"].get("padding_mask")
    if not model.training:
        return View(source, None, None)
    seeds = [(model.cfg.seed, model.num_updates, utterance) for utterance in sample["id"].tolist()]
    unmixed = None
    if cfg.mixup_alpha > 0:
        shares = draw_mixup_coefficients(cfg.mixup_alpha, [(*seed, _SHARES) for seed in seeds])
        stays = [np.random.default_rng([*seed, _WHICH]).random() >= cfg.mixup_prob for seed in seeds]
        shares[torch.tensor(stays)] = 1.0
        shares = shares.to(source.device)
        source, _ = mix_waveforms(source, padding_mask, shares, normalize)
        unmixed = shares == 1
    masked = model.draw_masks(source, padding_mask, seeds) if str(cfg.teacher_mask) == "same" else None
    return View(source, masked, unmixed)
