"""What `ctc_distill` logs: fairseq's error rates and the means of its terms, from sums over batches and ranks."""

import math
from typing import Any, Dict, Sequence

from fairseq import metrics, utils
from fairseq.criterions.ctc import CtcCriterion
from torch import Tensor

from s3distill.criterions._sequence_terms import SEQUENCE_SUMS, log_sequence_term
from s3distill.losses.precision import at_least_float32

# what fairseq's `ctc` counts in validation
COUNTERS = ("w_errors", "wv_errors", "w_total", "c_errors", "c_total")
# sums that are no sums over frames
_SUMS = ("ntokens", "nsentences", "sample_size", "ctc_sum", "ctc_tokens", *SEQUENCE_SUMS, *COUNTERS)


def no_labels(logits: Tensor, training: bool, with_nbest: bool) -> Dict[str, Any]:
    """What labels log of a batch that has none.

    fairseq adds logs up over ranks by their order: all batches must log the same, tensors where others log tensors.
    """
    zero = logits.detach().new_zeros((), dtype=at_least_float32(logits).dtype)
    log: Dict[str, Any] = {} if training else dict.fromkeys(COUNTERS, 0)
    log |= {"ctc_sum": zero, "ctc_tokens": 0}
    return log | (dict(zip(SEQUENCE_SUMS, (zero, 0, 0), strict=True)) if with_nbest and training else {})


def log_ctc_metrics(logging_outputs: Sequence[Dict[str, Any]]) -> None:
    """Logs losses in nats, as `layer_distill` does (fairseq's own prints bits): CTC per label, all others per frame."""
    names = {name for log in logging_outputs for name in log} | {"loss", "sample_size"}
    total = {name: utils.item(sum(log.get(name, 0) for log in logging_outputs)) for name in names}
    frames = max(total["sample_size"], 1)
    stock = {"loss": total["loss"] * math.log(2), "ntokens": frames, "sample_size": frames}
    CtcCriterion.reduce_metrics([stock | {name: total.get(name, 0) for name in ("nsentences", *COUNTERS)}])
    if total.get("ctc_tokens"):
        metrics.log_scalar("loss_ctc", total["ctc_sum"] / total["ctc_tokens"], total["ctc_tokens"], round=5)
    log_sequence_term(total)
    for name in sorted(set(total) - {"loss", *_SUMS}):
        value = total[name] / frames
        metrics.log_scalar(name.removeprefix("size_"), value, frames, round=5 if math.isfinite(value) else None)
