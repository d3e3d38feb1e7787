"""Checks on audio that the compact encoder is the gated one: the last step before a pruned checkpoint is written."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from s3distill.encoder.model import SpeechEncoder
from s3distill.gates.values import GateValues

TOLERANCE = 1e-5  # relative, float32


@dataclass(frozen=True)
class Equivalence:
    """Largest deviation between gated and compact encoder, relative to each hidden state's largest absolute value."""

    relative_error: float
    layer: int  # hidden state with the largest deviation

    @property
    def holds(self) -> bool:
        return self.relative_error <= TOLERANCE


@torch.no_grad()
def compare(
    gated: SpeechEncoder, gates: GateValues, compact: SpeechEncoder, source: Tensor, padding_mask: Tensor | None = None
) -> Equivalence:
    """Runs both encoders in eval mode on the same audio.

    Args:
        gates: deterministic gate values of ``gated``.
        source: [B, S], 16 kHz; ``padding_mask`` [B, S], True = padding, or None.
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
        expected = expected[..., stays]
        difference = (got[valid] - expected[valid]).abs().max() / expected[valid].abs().max().clamp_min(1e-12)
        if not difference <= worst:  # also catches NaN
            worst, layer = float(difference), i
    return Equivalence(worst, layer)
