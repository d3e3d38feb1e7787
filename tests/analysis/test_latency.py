"""Measuring latency tables: every part of every family is there, and what is timed is the real module."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch

from s3distill import compat
from s3distill.analysis import latency, timing
from s3distill.analysis.latency import measure_latency
from s3distill.cli.main import main
from s3distill.encoder.config import EncoderConfig, LayerConfig, parse_conv_layers, uniform_layers
from s3distill.encoder.model import SpeechEncoder
from s3distill.gates import GateCounts, LatencyTable, count_cost

CONV = parse_conv_layers("[(6, 10, 5), (8, 8, 64)]")
WAVLM = {"position_buckets": 20, "position_heads": 2}
CONFIGS = {
    "post_ln": EncoderConfig(CONV, 8, uniform_layers(2, 2, 4, 12), pos_conv_kernel=4, pos_conv_groups=2),
    "pre_ln": EncoderConfig(CONV, 8, uniform_layers(2, 2, 4, 12), "layer_norm", True, True, pos_conv_groups=2),
    "data2vec": EncoderConfig(CONV, 8, uniform_layers(2, 2, 4, 12), pos_conv_depth=3, pos_conv_groups=4),
    "wavlm": EncoderConfig(CONV, 8, uniform_layers(2, 2, 4, 12, True), pos_conv_groups=2, **WAVLM),
    "unprojected": EncoderConfig(CONV, 8, uniform_layers(2, 2, 4, 12), project_features=False, pos_conv_groups=2),
    "windowed": EncoderConfig(
        CONV, 8, uniform_layers(2, 2, 4, 12), pos_conv_groups=2, attention="windowed", attention_window=2
    ),
    "no_layers": EncoderConfig(CONV, 8, (), pos_conv_groups=2),
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MIN_CALL_S", 0.0)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_part_is_measured(name: str) -> None:
    config = CONFIGS[name]
    table = measure_latency(config, seconds=0.1, num_threads=1, repeats=1)
    full = GateCounts.full(config)
    assert table.audio_s == 0.1 and table.machine["num_threads"] == 1
    assert float(count_cost(config, full, table)) == pytest.approx(table.whole_s / 0.1)
    assert min(table.breakdown(full).values()) > 0
    assert LatencyTable.from_json(table.to_json()) == table
    for part, grid in table.grids.items():
        least = {"attention": 0, "ffn": 0, "pos_conv": config.pos_conv_groups}.get(part.partition(".")[0], 1)
        assert grid.rows[0] == least and all(row > 0 for row in grid.seconds[-1])


def test_each_round_times_every_point_and_the_minimum_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The round to warm up does not count, however fast."""
    config = EncoderConfig(CONV[:1], 8, (), pos_conv_groups=2)
    num_points = len(list(latency._points(config, 1600))) + 1
    monkeypatch.setattr(latency, "seconds_of", lambda call, device: next(clock))
    rounds = [1e-9] * num_points, range(1, num_points + 1), [0.5] * num_points
    clock = itertools.chain(*rounds)
    table = measure_latency(config, seconds=0.1, repeats=2)
    measured = {value for grid in table.grids.values() for row in grid.seconds for value in row}
    assert table.whole_s == 0.5 and measured == {0.5}
    assert next(clock, None) is None, "every point once per round"


def test_what_is_timed_has_the_sizes_that_are_written() -> None:
    config = CONFIGS["wavlm"]
    points = {(p.part, p.row, p.column): p for p in latency._points(config, 1600)}
    attention = points["attention.2x4", 1, 4].module.layer.self_attn
    assert attention.q_proj.weight.shape == (4, 4) and attention.grep_linear.weight.shape == (8, 4)
    assert points["attention.2x4", 0, 4].module.layer.self_attn is None
    assert points["ffn.12", 6, 8].module.layer.fc1.weight.shape == (6, 8)
    assert points["conv.1", 3, 4].module.conv.weight.shape == (4, 3, 8)
    assert points["projection", 8, 2].module[1].weight.shape == (2, 8)
    assert points["pos_conv", 8, 8].module.pos_conv[0].weight_v.shape == (8, 4, 128)
    assert points["pos_conv", 4, 2].module.pos_conv[0].weight_v.shape == (4, 1, 128)
    assert len(points["pos_conv", 4, 0].module.pos_conv) == 0


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = CONFIGS["post_ln"]
    options = {"_name": "ssl_student", "encoder": config.to_json()}
    compat.write_checkpoint(tmp_path / "a.pt", SpeechEncoder(config).state_dict(), options, {"normalize": False})
    command = ["latency-table", str(tmp_path / "a.pt"), "--seconds", "0.1", "--repeats", "1", "--threads", "1"]
    assert main([*command, "-o", str(tmp_path / "t.json")]) == 0
    table = LatencyTable.from_json((tmp_path / "t.json").read_text())
    out = capsys.readouterr().out
    assert table.config == config and f"real-time factor {table.whole_s / 0.1:.4f}" in out
    assert [path.name for path in tmp_path.iterdir() if "json" in path.name] == ["t.json"]

    assert main([*command, "-o", str(tmp_path / "no" / "t.json")]) == 2
    assert "the folder of the table must exist" in capsys.readouterr().err
    assert main([*command[:-1], "0", "-o", str(tmp_path / "t.json")]) == 2
    assert "needs at least one round, one thread and one frame of audio" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu() -> None:
    table = measure_latency(CONFIGS["wavlm"], seconds=0.1, repeats=1, device="cuda")
    assert table.machine["device"] == torch.cuda.get_device_name()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"time_reduction": 2}, "time_reduction"),
        ({"shared": "all"}, "shared"),
        ({"layers": (LayerConfig(2, 8, 24), LayerConfig(2, 8, 24, reuses_attention=True))}, "reuses_attention"),
    ],
)
def test_variants_that_a_table_has_no_parts_for(changes: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=f"no parts for encoders with {named}; aim at MACs instead"):
        measure_latency(dataclasses.replace(CONFIGS["post_ln"], **changes), seconds=1, repeats=1)


def test_audio_that_a_linformer_cannot_attend_to() -> None:
    config = dataclasses.replace(CONFIGS["post_ln"], attention="linformer", linformer_dim=2, linformer_max_frames=4)
    with pytest.raises(
        ValueError, match=r"`seconds` must be within the 4 frames .* but 1 s are 50 frames; time shorter"
    ):
        measure_latency(config, seconds=1, repeats=1)
