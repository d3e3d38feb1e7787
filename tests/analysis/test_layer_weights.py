"""Weights of kept heads: read from checkpoints as they are applied, and drawn."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from s3distill import compat
from s3distill.analysis.layer_weights import plot_layer_weights, read_layer_weights, write_layer_weights
from s3distill.analysis.measure import describe
from s3distill.cli.main import main
from s3distill.encoder.config import ConvLayerConfig, EncoderConfig, uniform_layers
from s3distill.encoder.model import SpeechEncoder
from s3distill.encoder.options import options_from_config
from s3distill.heads import HeadsConfig

LAYERS = (4, 8, 12)


def write(path: Path, logits: list[float] | None) -> Path:
    """An encoder that keeps one head per logit; None: no heads."""
    output = None
    if logits is not None:
        pairs = tuple((2, layer) for layer in LAYERS[: len(logits)])
        output = HeadsConfig(pairs, 8, 6, num_student_layers=2, mode="predlayer")
    config = EncoderConfig(
        conv_layers=(ConvLayerConfig(4, 10, 5),),
        embed_dim=8,
        layers=uniform_layers(2, 2, 4, 8),
        pos_conv_kernel=4,
        pos_conv_groups=2,
        output=output,
    )
    state = SpeechEncoder(config).state_dict()
    if logits is not None and len(logits) > 1:
        state["output_heads.layer_weights"] = torch.tensor(logits)
    compat.write_checkpoint(path, state, options_from_config(config, "ssl_student", False), {"_name": "audio_distill"})
    return path


def test_shares_are_the_softmax(tmp_path: Path) -> None:
    path = write(tmp_path / "kept.pt", [0.0, math.log(2.0), math.log(5.0)])
    assert read_layer_weights(path) == pytest.approx({4: 1 / 8, 8: 2 / 8, 12: 5 / 8})


def test_command_and_inspect_show_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    asr = write(tmp_path / "asr.pt", [0.0, math.log(2.0), math.log(5.0)])
    sid = write(tmp_path / "sid<1>.pt", [math.log(3.0), 0.0, 0.0])
    page = tmp_path / "weights.html"
    assert main(["layer-weights", str(asr), str(sid), "-o", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "4 0.125  8 0.250  12 0.625" in printed and "4 0.600  8 0.200  12 0.200" in printed
    text = page.read_text()
    assert "<svg" in text and "0.625" in text and "sid&lt;1&gt;.pt" in text and "sid<1>" not in text
    assert describe(asr)["output"] == {"dim": 6, "weights": pytest.approx({4: 1 / 8, 8: 2 / 8, 12: 5 / 8})}
    assert main(["inspect", str(asr), "--no-rtf"]) == 0
    assert "output: teacher layer 4 0.125, 8 0.250, 12 0.625 (width 6)" in capsys.readouterr().out


def test_layers_that_a_model_does_not_predict_are_left_out(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    weights = {"a": {4: 0.5, 12: 0.5}, "b": {4: 0.2, 8: 0.8}}
    assert "a: layer 4 most, 0.500; b: layer 8 most, 0.800" in plot_layer_weights(weights)
    write_layer_weights(tmp_path / "page.html", weights)
    assert "<td>0.500</td><td>-</td><td>0.500</td>" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(("logits", "kept"), [(None, "none"), ([0.0], "one")])
def test_what_has_no_weights(tmp_path: Path, logits: list[float] | None, kept: str) -> None:
    with pytest.raises(ValueError, match=rf"but keeps {kept}; make such a student with s3distill keep-heads"):
        read_layer_weights(write(tmp_path / "student.pt", logits))
