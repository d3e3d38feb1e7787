"""A gated CTC student is cut with its head: the logits are what they were."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from s3distill.encoder.checkpoint import ParsedCheckpoint
from s3distill.encoder.model import SpeechEncoder
from s3distill.gates import GateSet
from s3distill.pruning.compact import prune_student
from s3distill.pruning.plan import plan_from_gates
from s3distill.pruning.surgery import cut
from s3distill.pruning.verify import compare
from tests.pruning.test_pruning import padded_batch
from tests.pruning.test_width_pruning import wide

UNITS = ["head", "ffn", "width", "pos_conv"]


def gated_student(pre_ln: bool) -> ParsedCheckpoint:
    """Half of every unit's gates closed."""
    torch.manual_seed(0)
    config = wide("layer_norm", pre_ln)
    gates = GateSet(config, UNITS)
    with torch.no_grad():
        for _, _, gate in gates.all_gates():
            gate.log_alpha.copy_(torch.randn(gate.num_gates).sign() * 4 + torch.randn(gate.num_gates))
    head = {"weight": torch.randn(7, config.embed_dim), "bias": torch.randn(7)}
    return ParsedCheckpoint(
        "ssl_student",
        config,
        dict(SpeechEncoder(config).state_dict()),
        False,
        head_state=head,
        extra_state={f"gates.{name}": value for name, value in gates.state_dict().items()},
        model_options={"prune_units": UNITS},
    )


@pytest.mark.parametrize("pre_ln", [True, False])
def test_the_head_reads_the_channels_that_are_left(pre_ln: bool) -> None:
    student = gated_student(pre_ln)
    source, padding_mask = padded_batch()
    compact = prune_student(student, source, padding_mask)
    assert compact.head_state is not None and student.head_state is not None
    width = compact.config.embed_dim
    assert 0 < width < student.config.embed_dim and compact.head_state["weight"].shape == (7, width)
    assert torch.equal(compact.head_state["bias"], student.head_state["bias"]) and compact.equivalence.holds


def test_a_head_that_was_cut_wrongly_is_found() -> None:
    student = gated_student(True)
    source, padding_mask = padded_batch()
    gates = GateSet(student.config, UNITS)
    gates.load_state_dict({k.removeprefix("gates."): v for k, v in student.extra_state.items()})
    values = gates.deterministic()
    plan = plan_from_gates(student.config, values)
    config, state = cut(student.config, student.encoder_state, plan)
    encoders = [SpeechEncoder(student.config), SpeechEncoder(config)]
    for encoder, weights in zip(encoders, (student.encoder_state, state), strict=True):
        encoder.load_encoder_state(weights)
    head = student.head_state
    assert head is not None
    wrong = {**head, "weight": head["weight"][:, : config.embed_dim]}
    found = compare(encoders[0], values, encoders[1], source, padding_mask, head, wrong)
    assert not found.holds and found.place == "the logits"
    assert dataclasses.replace(found, layer=found.num_states).place == "the output"
    assert dataclasses.replace(found, layer=2).place == "hidden state 2"
