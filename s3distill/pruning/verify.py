"""Checks on audio that the compact encoder is the gated one: the last step before a pruned checkpoint is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from s3distill.encoder.model import SpeechEncoder
from s3distill.gates.values import GateValues

TOLERANCE = 1e-5  # relative, float32


@dataclass(frozen=True)
class Equivalence:
    """Largest deviation between gated and compact encoder, relative to each hidden state's largest absolute value."""

    relative_error: float
    layer: int  # hidden state with the largest deviation; behind the last one: the output, then the logits
    num_states: int = 0  # hidden states that were compared, the output not counted

    @property
    def place(self) -> str:
        """Where the largest deviation is, for messages."""
        beyond = {self.num_states: "the output", self.num_states + 1: "the logits"}
        return beyond.get(self.layer, f"hidden state {self.layer}") if self.num_states else f"hidden state {self.layer}"

    @property
    def holds(self) -> bool:
        return self.relative_error <= TOLERANCE


@torch.no_grad()
def compare(
    gated: SpeechEncoder,
    gates: GateValues,
    compact: SpeechEncoder,
    source: Tensor,
    padding_mask: Tensor | None = None,
    head: Mapping[str, Tensor] | None = None,
    compact_head: Mapping[str, Tensor] | None = None,
) -> Equivalence:
    """Runs both encoders in eval mode on the same audio.

    Args:
        gates: deterministic gate values of ``gated``.
        source: [B, S], 16 kHz; ``padding_mask`` [B, S], True = padding, or None.
        head, compact_head: ``weight`` [V, C] and ``bias`` [V] of both CTC heads, whose logits are compared too, or None.
    """
    was_training = gated.training, compact.training
    reference = SpeechEncoder.forward(gated.eval(), source, padding_mask, gates=gates)
    result = SpeechEncoder.forward(compact.eval(), source, padding_mask)
    gated.train(was_training[0])
    compact.train(was_training[1])
    stays = slice(None) if gates.width is None else gates.width > 0  # closed channels of the stream are gone
    worst, layer = 0.0, 0
    valid = slice(None) if reference.padding_mask is None else ~reference.padding_mask
    pairs = zip([*reference.hidden_states, reference.x], [*result.hidden_states, result.x], strict=True)
    for i, (expected, got) in enumerate(pairs):
        difference = _relative(expected[..., stays][valid], got[valid])
        if not difference <= worst:  # also catches NaN
            worst, layer = difference, i
    if head is not None and compact_head is not None:
        expected, got = F.linear(reference.x, **head), F.linear(result.x, **compact_head)
        difference = _relative(expected[valid], got[valid])
        if not difference <= worst:
            worst, layer = difference, len(reference.hidden_states) + 1
    return Equivalence(worst, layer, len(reference.hidden_states))


def _relative(expected: Tensor, got: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
