"""Gated student in, compact student out: gates -> plan -> surgery -> check on audio."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from s3distill.encoder.checkpoint import ParsedCheckpoint
from s3distill.encoder.config import EncoderConfig
from s3distill.encoder.model import SpeechEncoder
from s3distill.gates.counts import GateCounts
from s3distill.gates.gate_set import GateSet
from s3distill.pruning.plan import PruningPlan, plan_from_gates
from s3distill.pruning.surgery import cut
from s3distill.pruning.verify import TOLERANCE, Equivalence, compare
from s3distill.pruning.width import cut_ctc_head


@dataclass(frozen=True)
class CompactStudent:
    """Result of `prune_student`.

    Attributes:
        config, state: shape and encoder parameters of the compact student.
        head_state: its CTC head, ``weight`` [V, C] and ``bias`` [V], or None.
        plan: what stays of the gated one.
        kept: structures that the gates keep, in the terms of the gated student (a latency table's).
        before, after: structures before and after, by unit and layer (for `count_parameters` and the report).
        equivalence: how far the compact student is from the gated one, on the audio that was given.
    """

    config: EncoderConfig
    state: dict[str, Tensor]
    head_state: dict[str, Tensor] | None
    plan: PruningPlan
    kept: GateCounts
    before: GateCounts
    after: GateCounts
    equivalence: Equivalence


def load_gates(student: ParsedCheckpoint, name: str) -> GateSet:
    """The trained gates of a student's checkpoint.

    Raises:
        ValueError: it has none.
    """
    found = {k.removeprefix("gates."): v for k, v in student.extra_state.items() if k.startswith("gates.")}
    units = list(student.student_options.get("prune_units") or [])
    if not found or not units:
        raise ValueError(
            f"{name} has no gates to prune by; it must be an `ssl_student` or `wav2vec_ctc_student` that was trained with e.g. "
            "model.prune_units=[conv,head,ffn] and criterion.target_sparsity"
        )
    gates = GateSet(student.config, units)
    gates.load_state_dict(found)
    return gates


def prune_student(
    student: ParsedCheckpoint, source: Tensor, padding_mask: Tensor | None = None, name: str = "the student"
) -> CompactStudent:
    """Cuts the closed gates out of a student and checks that nothing else changed.

    Args:
        student: a gated `ssl_student` or `wav2vec_ctc_student`; masks must be multiplied in (`masks.state.baked`).
        source: audio for the check, [B, S], 16 kHz, normalised as the student wants it.
        padding_mask: [B, S], True = padding, or None.
    Raises:
        ValueError: no gates, or nothing would be left of a conv layer.
        RuntimeError: the compact student differs from the gated one by more than `TOLERANCE`.
    """
    values = load_gates(student, name).deterministic()
    plan = plan_from_gates(student.config, values)
    config, state = cut(student.config, student.encoder_state, plan)
    gated, compact = SpeechEncoder(student.config), SpeechEncoder(config)
    gated.load_encoder_state(student.encoder_state, name)
    compact.load_encoder_state(state, "the cut state")
    head, compact_head = student.head_state, None
    if head is not None:
        compact_head = cut_ctc_head(head, plan.width)
    equivalence = compare(gated, values, compact, source, padding_mask, head, compact_head)
    if not equivalence.holds:
        raise RuntimeError(
            f"the pruned student differs from the gated one: relative error {equivalence.relative_error:.1e} at "
            f"{equivalence.place}, allowed are {TOLERANCE:.0e}; nothing was written. Is the audio silent or the checkpoint diverged? "
            "Otherwise please report it"
        )
    kept = GateCounts.from_values(student.config, values)
    return CompactStudent(
        config, state, compact_head, plan, kept, GateCounts.full(student.config), GateCounts.full(config), equivalence
    )
