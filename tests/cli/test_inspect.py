"""`s3distill inspect` as a user runs it."""

import json
from pathlib import Path

import pytest
import torch

from s3distill.analysis import measure
from s3distill.cli.main import main
from s3distill.encoder.config import ConvLayerConfig, EncoderConfig, uniform_layers
from s3distill.encoder.model import SpeechEncoder


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "MIN_TIMING_S", 0.0)


def write_student(path: Path, num_heads: int, ffn_dim: int) -> str:
    config = EncoderConfig(
        conv_layers=(ConvLayerConfig(6, 10, 5), ConvLayerConfig(7, 8, 64)),
        embed_dim=8,
        layers=uniform_layers(2, num_heads, 4, ffn_dim),
        pos_conv_kernel=4,
        pos_conv_groups=2,
    )
    cfg = {"model": {"_name": "ssl_student", "encoder": config.to_json()}, "task": {"normalize": False}}
    torch.save({"model": SpeechEncoder(config).state_dict(), "cfg": cfg}, path)
    return str(path)


def test_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_student(tmp_path / "a.pt", 2, 16)
    assert main(["inspect", path, "--seconds", "0.5", "--threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{path}: ssl_student (ssl_student), ")
    assert any(line.startswith("parameters, encoder") for line in lines)
    assert any(line.startswith("real-time factor, CPU, 1 threads") for line in lines)
    assert "  layer  1    2 heads of   4   FFN 16" in lines
    assert "  conv  0       6 channels   kernel 10   stride 5" in lines
    assert not any("output head" in line for line in lines), "what is not there is not listed"


def test_compare_as_json_holds_both_and_the_speedup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small, large = write_student(tmp_path / "small.pt", 1, 4), write_student(tmp_path / "large.pt", 2, 64)
    assert main(["inspect", small, "--compare", large, "--json", "--seconds", "0.5"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["params"]["encoder"] < report["other"]["params"]["encoder"]
    assert report["speedup"] == pytest.approx(report["other"]["rtf"] / report["rtf"])
    assert main(["inspect", small, "--compare", large, "--no-rtf"]) == 0
    table = capsys.readouterr().out
    assert "OTHER" in table and "real-time" not in table
    kept = report["params"]["total"] / report["other"]["params"]["total"]
    row = next(line for line in table.splitlines() if line.startswith("parameters, all"))
    assert row.endswith(f"{100 * kept:.1f}%")


def test_no_rtf_measures_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", write_student(tmp_path / "a.pt", 2, 16), "--no-rtf", "--json"]) == 0
    assert "rtf" not in json.loads(capsys.readouterr().out)


def test_a_file_that_is_no_checkpoint_is_one_line_of_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"not a checkpoint")
    assert main(["inspect", str(broken)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith(f"s3distill inspect: error: checkpoint {broken} cannot be read")
    assert main(["inspect", str(tmp_path / "gone.pt")]) == 2
