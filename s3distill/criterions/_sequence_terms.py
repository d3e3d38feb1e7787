"""Sequence-level distillation in `ctc_distill`: its options, their checks, and the term."""

# no `from __future__ import annotations`: fairseq reads the types of config fields
import math
from dataclasses import dataclass, field
from typing import Any, Dict, Optional, Tuple

from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from torch import Tensor

from s3distill.losses.sequence import SEQUENCE_WEIGHTS, NbestTargets, nbest_ctc_loss


@dataclass
class SequenceOptions(FairseqDataclass):
    """Options of the n-best term."""

    seq_kd: ChoiceEnum(["none", *SEQUENCE_WEIGHTS]) = field(  # type: ignore[valid-type]
        default="none",
        metadata={
            "help": "the teacher's n-best hypotheses (task.nbest) in place of the labels: one_best: the first alone; uniform: all, by their "
            "posteriors; ranked: also by their rank, see seq_beta"
        },
    )
    seq_beta: float = field(
        default=2.0, metadata={"help": "of ranked: rank k counts exp(-beta (k - 1)); 0 is uniform"}
    )
    gold_weight: float = field(
        default=0.0,
        metadata={
            "help": "of seq_kd: share of the label file beside the n-best list, in [0, 1]; 0 where the labels are pseudo-labels, too"
        },
    )


def check_sequence_options(cfg: Any, has_nbest: bool) -> None:
    """Ranges, and n-best lists and their use together.

    Args:
        cfg: the criterion's options.
        has_nbest: whether the task reads n-best lists.
    Raises:
        ValueError: with the option to change.
    """
    if not 0 <= cfg.seq_beta < math.inf:
        raise ValueError(f"`criterion.seq_beta` must be at least 0 and finite, but is {cfg.seq_beta}; 2 is usual")
    if not 0 <= cfg.gold_weight <= 1:
        raise ValueError(
            f"`criterion.gold_weight` is the share of the labels and must be in [0, 1], but is {cfg.gold_weight}; 0 trains on the n-best "
            "list alone"
        )
    used = str(cfg.seq_kd) != "none"
    if used and not has_nbest:
        raise ValueError(
            f"`criterion.seq_kd={cfg.seq_kd}` needs n-best lists, but task.nbest is false; pass task.nbest=true and train on what "
            "`s3distill pseudo-label --nbest K` wrote"
        )
    if has_nbest and not used:
        raise ValueError(
            "`task.nbest=true` reads n-best lists, but criterion.seq_kd=none does not use them; pass criterion.seq_kd=ranked, or leave "
            "task.nbest out"
        )
    if used and cfg.alpha == 0:
        raise ValueError(
            f"`criterion.seq_kd={cfg.seq_kd}` stands in the place of the labels, whose weight criterion.alpha is 0; pass e.g. "
            "criterion.alpha=1"
        )


def sequence_term(
    cfg: Any, log_probs: Tensor, padding_mask: Optional[Tensor], sample: Any, blank: int
) -> Tuple[Tensor, Dict[str, Any]]:
    """Mean over the utterances of a batch of the n-best loss, and what to log, as sums.

    Args:
        log_probs: [B, T, V].
        sample: fairseq's batch, with ``nbest``.
    """
    found = nbest_ctc_loss(
        log_probs, padding_mask, NbestTargets(**sample["nbest"]), blank, str(cfg.seq_kd), cfg.seq_beta
    )
    log = {
        "seq_sum": found.total.detach(),
        "seq_utterances": found.num_scored,
        "seq_impossible": found.num_impossible,
    }
    return found.total / max(found.num_scored, 1), log
