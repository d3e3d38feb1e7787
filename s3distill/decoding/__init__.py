"""From log-probabilities to transcripts and their error rates."""

from s3distill.decoding.ctc import CtcHypothesis, average_log_probs, greedy_decode
from s3distill.decoding.prefix_beam import prefix_beam_search
from s3distill.decoding.scoring import ErrorRates, error_rates

__all__ = [
    "CtcHypothesis",
    "ErrorRates",
    "average_log_probs",
    "error_rates",
    "greedy_decode",
    "prefix_beam_search",
]
