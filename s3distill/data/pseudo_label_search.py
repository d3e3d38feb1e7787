"""How a teacher is decoded for pseudo-labels: greedily, by a prefix beam search, or with a lexicon and a language model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from s3distill.decoding.ctc import CtcHypothesis, greedy_decode
from s3distill.decoding.lexicon_lm import LexiconLmSearch, LmOptions
from s3distill.decoding.prefix_beam import prefix_beam_search

BLANK = 0  # fairseq's `<s>`

# log-probabilities [B, T, V] and padding mask [B, T] -> hypotheses of each utterance, best first
Search = Callable[[Tensor, Tensor | None], list[list[CtcHypothesis]]]


@dataclass(frozen=True)
class DecodeOptions:
    """How a manifest is decoded.

    Args:
        nbest: hypotheses to keep of each utterance.
        beam: width of the search; 1 with ``nbest=1``, and without lexicon and language model, is greedy decoding.
        batch_size: utterances at a time. Batches are the same whatever the shards, so that not even rounding differs.
        lexicon, ngram_lm, lm_weight, word_score: see `LmOptions`; the first two None: a prefix beam search.
        shard, num_shards: decode every ``num_shards``-th batch, from 1.
    """

    nbest: int = 1
    beam: int = 1
    batch_size: int = 8
    lexicon: str | None = None
    ngram_lm: str | None = None
    lm_weight: float = 0.0
    word_score: float = 0.0
    shard: int = 1
    num_shards: int = 1

    def __post_init__(self) -> None:
        for name in ("nbest", "beam", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, but is {getattr(self, name)}")
        if self.beam < self.nbest:
            raise ValueError(
                f"`beam` must be at least `nbest`, since no more hypotheses are at hand, but they are {self.beam} and {self.nbest}"
            )
        if not 1 <= self.shard <= self.num_shards:
            raise ValueError(
                f"a shard must be I/N with I from 1 to N, but is {self.shard}/{self.num_shards}; the first of four is 1/4"
            )
        if not self.has_language_model and (self.lm_weight or self.word_score):
            raise ValueError(
                f"`lm_weight` and `word_score` need a language model or lexicon, but there is none and they are {self.lm_weight} and "
                f"{self.word_score}; give `ngram_lm` or `lexicon`, or leave them out"
            )

    @property
    def has_language_model(self) -> bool:
        return self.lexicon is not None or self.ngram_lm is not None

    def settings(self) -> dict[str, Any]:
        """What decides the result, for the journal; files by their content."""
        values: dict[str, Any] = {"nbest": self.nbest, "beam": self.beam, "batch_size": self.batch_size}
        if self.has_language_model:
            values |= {"lexicon": _digest(self.lexicon), "ngram_lm": _digest(self.ngram_lm)}
            values |= {"lm_weight": self.lm_weight, "word_score": self.word_score}
        return values


def search_of(symbols: Sequence[str], options: DecodeOptions) -> Search:
    """The search that the options ask for.

    Args:
        symbols: what the model's outputs are, in their order.
    Raises:
        RuntimeError, ValueError: see `LexiconLmSearch`.
    """
    if options.has_language_model:
        found = LexiconLmSearch(
            symbols,
            BLANK,
            LmOptions(options.lexicon, options.ngram_lm, options.lm_weight, options.word_score, options.beam),
        )
        return lambda log_probs, padding_mask: found(log_probs, padding_mask, options.beam)
    if options.beam == 1:
        return _greedy
    return lambda log_probs, padding_mask: prefix_beam_search(
        log_probs, padding_mask, BLANK, options.beam, options.beam
    )


def _greedy(log_probs: Tensor, padding_mask: Tensor | None) -> list[list[CtcHypothesis]]:
    """The best path's symbols, with the log-probability of all of their paths, as the other searches give it: that of the one
    path falls with every frame in which the model is unsure where a symbol begins, and not what it is."""
    found = greedy_decode(log_probs, padding_mask, BLANK)
    batch, num_frames, _ = log_probs.shape
    frames = torch.full((batch,), num_frames) if padding_mask is None else (~padding_mask).sum(1).cpu()
    lengths = torch.tensor([len(hypothesis.tokens) for hypothesis in found])
    targets = torch.nn.utils.rnn.pad_sequence([h.tokens for h in found], batch_first=True).to(log_probs.device)
    losses = F.ctc_loss(log_probs.transpose(0, 1), targets, frames, lengths, BLANK, reduction="none").tolist()
    return [[replace(hypothesis, score=-loss)] for hypothesis, loss in zip(found, losses, strict=True)]


def _digest(path: str | None) -> str | None:
    """SHA-256 of a file."""
    if path is None:
        return None
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
