"""fairseq's own BLEU, which `fairseq-generate` computes without a ``--scoring``, survives empty transcripts."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def know_empty_transcripts() -> None:
    """Gives an empty transcript an end of sentence before libbleu sees it.

    Its ``bleu_rtrim`` looks for the last symbol at ``length - 1``, an unsigned number: from 0 it goes on far outside of the
    memory of the sentence, for a very long time or into a crash. An end of sentence alone matches nothing.
    """
    from fairseq.scoring import bleu

    stock = bleu.Scorer.add

    @functools.wraps(stock)
    def add(self: bleu.Scorer, ref: Tensor, pred: Tensor) -> None:
        sentences = (torch.tensor([self.eos], dtype=x.dtype) if _is_empty(x) else x for x in (ref, pred))
        stock(self, *sentences)

    bleu.Scorer.add = add


def _is_empty(sentence: object) -> bool:
    return isinstance(sentence, Tensor) and not sentence.numel()
