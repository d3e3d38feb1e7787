"""Learning from the teacher's logits where it is sure: which frames, or utterances, `ctc_distill` takes."""

# no `from __future__ import annotations`: fairseq reads the types of config fields
from dataclasses import dataclass, field
from typing import Any, Dict, Optional, Tuple

import torch
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from torch import Tensor, nn

from s3distill.losses.confidence import RelativeThreshold, check_threshold, confident_frames, utterance_confidence

CONFIDENCES = ("none", "frames", "utterances")


@dataclass
class ConfidenceOptions(FairseqDataclass):
    """Thresholds of the teacher's posteriors."""

    confidence: ChoiceEnum(list(CONFIDENCES)) = field(  # type: ignore[valid-type]
        default="none",
        metadata={
            "help": "frames: logits count where the teacher's best symbol reaches the threshold; utterances: where the mean over frames "
            "that it reads as a symbol does; none: everywhere"
        },
    )
    confidence_threshold: float = field(
        default=0.9, metadata={"help": "posterior that must be reached; of confidence_relative its share"}
    )
    confidence_relative: bool = field(
        default=False,
        metadata={
            "help": "the threshold is that share of the teacher's mean confidence on labelled utterances (AdaMatch), a moving average"
        },
    )
    confidence_decay: float = field(default=0.99, metadata={"help": "of that moving average, in [0, 1)"})


class Confidence(nn.Module):
    """Weights of frames by the teacher's confidence; with a relative threshold its average is in the criterion's checkpoint.

    Args:
        cfg: `ConfidenceOptions`.
    Raises:
        ValueError: an option is out of range.
    """

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        check_threshold(cfg.confidence_threshold, "criterion.confidence_threshold")
        self.by_utterance, self.threshold = str(cfg.confidence) == "utterances", float(cfg.confidence_threshold)
        self.relative: Optional[RelativeThreshold] = None
        if cfg.confidence_relative:
            self.relative = RelativeThreshold(cfg.confidence_threshold, cfg.confidence_decay)
            # fairseq saves criterions that have a parameter, whether it learns or not
            self.saved = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(
        self, logits: Tensor, padding_mask: Optional[Tensor], blank: int, labelled: Optional[Tensor], learns: bool
    ) -> Tuple[Tensor, Dict[str, Tensor]]:
        """Which frames count, [B, T] bool, and what to log, per frame.

        Args:
            logits: the teacher's, [B, T, V].
            padding_mask: [B, T], True = padding, or None.
            labelled: [B] bool, utterances whose confidence the relative threshold follows; None: all.
            learns: whether it follows this batch (training).
        """
        if self.relative is not None and learns:
            rows = slice(None) if labelled is None else labelled
            mask = None if padding_mask is None else padding_mask[rows]
            self.relative.update(_over_ranks(RelativeThreshold.sums(logits[rows], mask, blank)))
        threshold = self.threshold if self.relative is None else self.relative.value
        if self.by_utterance:
            counts = (utterance_confidence(logits, padding_mask, blank) >= threshold)[:, None].expand(logits.shape[:2])
        else:
            counts = confident_frames(logits, padding_mask, threshold)
        valid = counts.numel() if padding_mask is None else (~padding_mask).sum()
        log = {} if self.relative is None else {"confidence_threshold": self.relative.value * valid}
        return counts, log


def confidence_of(cfg: Any, alpha: float) -> Optional[Confidence]:
    """What the options ask for, or None.

    Raises:
        ValueError: options of confidence without it, or confidence without logits.
    """
    if str(cfg.confidence) != "none":
        if alpha == 1:
            raise ValueError(
                f"`criterion.confidence={cfg.confidence}` is about the teacher's logits, which criterion.alpha=1 leaves out; pass a "
                "smaller criterion.alpha"
            )
        return Confidence(cfg)
    for name in ("confidence_threshold", "confidence_relative", "confidence_decay"):
        value, default = getattr(cfg, name), getattr(ConfidenceOptions, name)
        if value != default:
            raise ValueError(
                f"`criterion.{name}` is {value}, but criterion.confidence=none selects nothing; pass criterion.confidence=frames or "
                "utterances, or leave it out"
            )
    return None


def _over_ranks(sums: Tensor) -> Tensor:
    """The same sums on every rank, so that all have one threshold."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    return sums
