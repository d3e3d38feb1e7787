"""What `ctc_distill` logs: fairseq's error rates and the means of its terms, from sums over batches and ranks."""

import math
from typing import Any, Dict, Sequence

from fairseq import metrics, utils
from fairseq.criterions.ctc import CtcCriterion

from s3distill.criterions._sequence_terms import SEQUENCE_SUMS, log_sequence_term

# what fairseq's `ctc` counts in validation
COUNTERS = ("w_errors", "wv_errors", "w_total", "c_errors", "c_total")
# sums that are no sums over frames
_SUMS = ("ntokens", "nsentences", "sample_size", "ctc_sum", "ctc_tokens", *SEQUENCE_SUMS, *COUNTERS)


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
