"""`ssl_student` and its teacher, built from a run with connection masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("fairseq")

from omegaconf import OmegaConf

import s3distill
from s3distill.models.ssl_student import SslStudent, SslStudentConfig
from s3distill.tasks.audio_distill import AudioDistillConfig, AudioDistillTask
from tests.models import ctc_models, labels

WAVEFORM = torch.randn(1, 6000, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def _output(path: Path) -> Tensor:
    return s3distill.load(path)(WAVEFORM).x


@pytest.fixture(scope="module")
def masked_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Tensor]:
    """Its checkpoint, and the output of its encoder, masks applied."""
    folder = tmp_path_factory.mktemp("masked")
    (folder / "dict.ltr.txt").write_text("A 1\nB 1\n")
    backbone = labels.write_backbone(folder / "backbone.pt", normalize=False)
    task, model, cfg = labels.build(folder, backbone, name="wav2vec_ctc_st", normalize=False, prune_rate=0.4)
    labels.scramble(model)
    run = labels.write_run(folder / "run.pt", task, model, cfg)
    dense = _output(backbone)
    hidden = _output(run)
    assert not torch.allclose(hidden, dense, atol=1e-2), "the masks must matter"
    return run, folder, hidden


def test_a_student_starts_from_what_a_masked_run_computes(masked_run: tuple[Path, Any, Tensor]) -> None:
    run, _, hidden = masked_run
    cfg = OmegaConf.structured(SslStudentConfig(student_path=str(run), normalize=False, seed=1))
    student = SslStudent.build_model(cfg, None).eval()
    with torch.no_grad():
        assert torch.allclose(student.extract_features(WAVEFORM, None)["x"], hidden, atol=1e-5)


def test_a_masked_run_teaches_what_it_computes(masked_run: tuple[Path, Any, Tensor]) -> None:
    run, folder, hidden = masked_run
    task = AudioDistillTask(AudioDistillConfig(data=str(folder), teacher_path=str(run), normalize=False))
    layer = task.teacher.config.num_layers
    (state,), _ = task.teacher.hidden_states(WAVEFORM, None, [layer])
    assert torch.allclose(state, hidden, atol=1e-5)


def test_a_model_tuned_over_gates_that_were_not_pruned(tmp_path: Path) -> None:
    """They would be left out silently."""
    path = ctc_models.write_ctc(tmp_path / "tuned.pt")
    state = torch.load(path, weights_only=False)
    state["model"]["w2v_encoder.w2v_model.gates.ffn.0.log_alpha"] = torch.zeros(48)
    torch.save(state, path)
    cfg = OmegaConf.structured(SslStudentConfig(student_path=str(path), normalize=False, seed=1))
    with pytest.raises(ValueError, match=r"tuned\.pt was fine-tuned over gates that were not pruned yet"):
        SslStudent.build_model(cfg, None)
