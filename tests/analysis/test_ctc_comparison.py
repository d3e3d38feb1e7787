"""A gated CTC student in the report: counted and timed as pruning would leave it, masks and head included."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("fairseq")

from s3distill.analysis.comparison import compact_checkpoint
from s3distill.encoder.speech_model import SpeechModel
from tests.pruning.test_ctc_head import gated_student
from tests.pruning.test_pruning import padded_batch


def test_it_is_cut_with_its_head() -> None:
    student = gated_student(True)
    compact = compact_checkpoint(student, "the student")
    source, _ = padded_batch()
    with torch.no_grad():
        expected, got = SpeechModel(student)(source).logits, SpeechModel(compact)(source).logits
    assert expected is not None and got is not None
    assert compact.config.embed_dim < student.config.embed_dim and torch.allclose(got, expected, atol=1e-3)
