"""Counts of checkpoints against the modules that they load into; speed only for its form, never for its value."""

from pathlib import Path
from typing import Any

import pytest
import torch

import s3distill
from s3distill.analysis import measure
from s3distill.analysis.measure import describe, measure_rtf, measure_speedup
from s3distill.encoder.config import ConvLayerConfig, EncoderConfig, LayerConfig
from s3distill.encoder.model import SpeechEncoder

CONFIG = EncoderConfig(
    conv_layers=(ConvLayerConfig(6, 10, 5), ConvLayerConfig(7, 8, 4), ConvLayerConfig(5, 4, 16)),
    embed_dim=8,
    layers=(LayerConfig(2, 4, 12), LayerConfig(0, 4, 0, attention=False, ffn=False), LayerConfig(1, 4, 3)),
    pos_conv_kernel=4,
    pos_conv_groups=2,
)


def write_student(path: Path, extra: dict[str, torch.Tensor] | None = None, **task: Any) -> Path:
    torch.manual_seed(0)
    state = SpeechEncoder(CONFIG).state_dict() | (extra or {})
    cfg = {"model": {"_name": "ssl_student", "encoder": CONFIG.to_json()}, "task": {"normalize": True, **task}}
    torch.save({"model": state, "cfg": cfg}, path)
    return path


def write_fine_tuned(path: Path) -> Path:
    torch.manual_seed(0)
    state = {f"w2v_encoder.w2v_model.{k}": v for k, v in SpeechEncoder(CONFIG).state_dict().items()}
    state |= {"w2v_encoder.proj.weight": torch.randn(9, 8), "w2v_encoder.proj.bias": torch.zeros(9)}
    nested = {"model": {"_name": "ssl_student", "encoder": CONFIG.to_json()}, "task": {"normalize": True}}
    cfg = {"model": {"_name": "wav2vec_ctc", "w2v_args": nested}, "task": {"normalize": True}}
    torch.save({"model": state, "cfg": cfg}, path)
    return path


def test_counts_are_those_of_the_modules(tmp_path: Path) -> None:
    heads = {
        "heads.proj.0.weight": torch.zeros(8, 8),
        "gates.conv.0": torch.zeros(6),
        "lagrangian.lambda1": torch.zeros(()),
    }
    path = write_student(tmp_path / "student.pt", heads)
    report = describe(path)
    encoder = sum(p.numel() for p in SpeechEncoder(CONFIG).parameters())
    assert report["params"] == {
        "encoder": encoder,
        "ctc_head": 0,
        "prediction_heads": 64,
        "gates": 7,
        "other": 0,
        "total": encoder + 71,
    }
    assert sum(report["breakdown"]["params"].values()) == encoder
    assert sum(report["breakdown"]["macs_per_second"].values()) == pytest.approx(report["macs_per_second"])
    assert report["checkpoint_bytes"] == path.stat().st_size
    assert (report["family"], report["normalize"], report["num_symbols"]) == ("ssl_student", True, None)
    assert report["layers"][1]["attention"] is False and report["conv_layers"][0] == {
        "channels": 6,
        "kernel": 10,
        "stride": 5,
        "separable": False,
    }


def test_a_ctc_head_is_counted_apart(tmp_path: Path) -> None:
    report = describe(write_fine_tuned(tmp_path / "tuned.pt"))
    assert report["params"]["ctc_head"] == 81 and report["params"]["other"] == 0
    assert report["num_symbols"] == 9 and report["model"] == "wav2vec_ctc"
    model = s3distill.load(tmp_path / "tuned.pt")
    assert report["params"]["total"] == sum(p.numel() for p in model.parameters())


def test_measurements_state_what_was_measured_and_leave_the_threads_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "MIN_TIMING_S", 0.0)
    model = s3distill.load(write_student(tmp_path / "student.pt"))
    before = torch.get_num_threads()
    rtf = measure_rtf(model, seconds=0.5, repeats=2, num_threads=1)
    assert rtf.audio_s == 0.5 and rtf.num_threads == 1
    assert rtf.rtf == pytest.approx(rtf.processing_s / 0.5) and rtf.rtf > 0
    pair = measure_speedup(model, model, seconds=0.5, repeats=2)
    assert pair.speedup == pytest.approx(pair.teacher.processing_s / pair.student.processing_s)
    assert torch.get_num_threads() == before


def test_errors(tmp_path: Path) -> None:
    model = s3distill.load(write_student(tmp_path / "student.pt"))
    with pytest.raises(ValueError, match="must be at least 1, but are 0 and None"):
        measure_rtf(model, repeats=0)
    with pytest.raises(ValueError, match="every waveform must have at least"):
        measure_rtf(model, seconds=0.001)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        describe(tmp_path / "gone.pt")
