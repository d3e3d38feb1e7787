"""Sequence-level distillation in `ctc_distill`: its options, their checks, and the term."""

# no `from __future__ import annotations`: fairseq reads the types of config fields
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Dict, Optional, Tuple

from fairseq import metrics
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from torch import Tensor

from s3distill.losses.precision import at_least_float32
from s3distill.losses.sequence import SEQUENCE_WEIGHTS, NbestTargets, nbest_ctc_loss

SEQUENCE_SUMS = ("seq_sum", "seq_utterances", "seq_impossible")  # of what is logged, not per frame


@dataclass
class SequenceOptions(FairseqDataclass):
    """Options of the n-best term."""

    seq_kd: ChoiceEnum(["none", *SEQUENCE_WEIGHTS]) = field(  # type: ignore[valid-type]
        default="none",
        metadata={
            "help": "the teacher's n-best hypotheses (task.nbest) in place of the labels: one_best: the first alone; uniform: all, by "
            "their posteriors; ranked: also by their rank, see seq_beta"
        },
    )
    seq_beta: float = field(default=2.0, metadata={"help": "of ranked: rank k counts exp(-beta (k - 1)); 0 is uniform"})
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
    _check_idle(cfg, used)
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


def _check_idle(cfg: Any, used: bool) -> None:
    """Options that would do nothing (`ValueError`)."""
    if cfg.seq_beta != SequenceOptions.seq_beta and str(cfg.seq_kd) != "ranked":
        raise ValueError(
            f"`criterion.seq_beta` is about criterion.seq_kd=ranked, but is {cfg.seq_beta} beside seq_kd={cfg.seq_kd}; leave it out, "
            "or pass that"
        )
    if cfg.gold_weight != 0 and not used:
        raise ValueError(
            f"`criterion.gold_weight` is the share of the labels beside an n-best list, but is {cfg.gold_weight} where "
            "criterion.seq_kd=none reads none; leave it out, or pass criterion.seq_kd=ranked"
        )
    if cfg.gold_weight == 1 and used:
        raise ValueError(
            f"`criterion.gold_weight`=1 leaves nothing to the n-best lists of criterion.seq_kd={cfg.seq_kd}; pass less, or "
            "criterion.seq_kd=none and task.nbest=false"
        )


def label_term(
    cfg: Any, ctc: Tensor, logits: Tensor, padding_mask: Optional[Tensor], sample: Any, blank: int
) -> Tuple[Tensor, Dict[str, Any]]:
    """What labels and n-best list of a batch ask for, and what to log, as sums.

        g CTC(labels) + (1 - g) mean_b sum_k w_bk CTC(y_bk)/|y_bk|,   g = ``gold_weight``; see `nbest_ctc_loss`

    Args:
        ctc: the loss of the labels, [], per label; all there is without ``seq_kd``, and in validation.
        logits: [T, B, V].
        padding_mask: [B, T], True = padding, or None.
        sample: fairseq's batch; ``nbest`` in training with `task.nbest`.
    """
    if str(cfg.seq_kd) == "none" or "nbest" not in sample:
        return ctc, {}
    log_probs = at_least_float32(logits).log_softmax(-1).transpose(0, 1)  # [B, T, V]
    targets = NbestTargets(**sample["nbest"])
    found = nbest_ctc_loss(log_probs, padding_mask, targets, blank, str(cfg.seq_kd), cfg.seq_beta)
    log = {
        "seq_sum": found.total.detach(),
        "seq_utterances": found.num_scored,
        "seq_impossible": found.num_impossible,
    }
    loss = (1 - cfg.gold_weight) * found.total / max(found.num_scored, 1)
    if cfg.gold_weight > 0:  # an infinite loss of labels that do not fit must not turn into NaN
        loss = loss + cfg.gold_weight * ctc
    return loss, log


def log_sequence_term(total: Mapping[str, Any]) -> None:
    """Logs sums over batches and ranks as means per utterance."""
    if num_utterances := total.get("seq_utterances"):
        metrics.log_scalar("loss_seq", total["seq_sum"] / num_utterances, num_utterances, round=5)
        metrics.log_scalar("seq_impossible", total["seq_impossible"] / num_utterances, num_utterances, round=5)
