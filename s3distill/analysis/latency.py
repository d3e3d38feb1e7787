"""Measures a `LatencyTable`: every part of an encoder at several sizes, on this machine."""

from __future__ import annotations

import dataclasses
import itertools
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from s3distill.analysis.timing import seconds_of, threads
from s3distill.encoder.attention import bert_linear
from s3distill.encoder.config import SAMPLE_RATE, EncoderConfig, LayerConfig
from s3distill.encoder.conv import ConvLayer
from s3distill.encoder.layers import LayerNorm
from s3distill.encoder.model import SpeechEncoder
from s3distill.encoder.pos_shape import PosConvShape
from s3distill.encoder.positional import PositionalConv
from s3distill.encoder.training_config import TrainingConfig
from s3distill.encoder.transformer import TransformerLayer
from s3distill.gates.cost import UTTERANCE_S
from s3distill.gates.latency import Grid, LatencyTable

SHARES = (0.25, 0.5, 0.75, 1.0)  # of each size that are measured, besides the smallest that pruning leaves


@dataclass(frozen=True)
class _Point:
    """One size of one part, and what its module reads: [1, C, T] or [1, T, C]."""

    part: str
    row: int
    column: int
    module: nn.Module
    shape: tuple[int, int, int]


def measure_latency(
    config: EncoderConfig,
    seconds: float = UTTERANCE_S,
    num_threads: int | None = None,
    repeats: int = 5,
    device: str = "cpu",
    progress: bool = False,
) -> LatencyTable:
    """Times each part of an encoder of this shape at several sizes, with random weights, and the whole encoder.

    All points are timed once, then all once more, and so on: what else the machine does meets all of them. The minimum counts.

    Args:
        seconds: length of the utterance; attention makes long audio slower per second.
        num_threads: CPU threads; None keeps torch's setting.
        repeats: rounds, after one to warm up.
        device: of torch, e.g. ``cuda``.
        progress: show a bar.
    Raises:
        ValueError: no repeats, no threads, audio shorter than one frame, or a part that the table has no place for.
    """
    _check_parts(config)
    num_samples = round(seconds * SAMPLE_RATE)
    if num_samples < config.receptive_field or repeats < 1 or (num_threads is not None and num_threads < 1):
        raise ValueError(
            f"a latency table needs at least one round, one thread and one frame of audio ({config.receptive_field / SAMPLE_RATE:g} s), "
            f"but was asked for {repeats}, {num_threads} and {seconds:g} s"
        )
    frames = int(config.num_frames(num_samples))
    if config.attention == "linformer" and frames > config.linformer_max_frames:
        raise ValueError(
            f"`seconds` must be within the {config.linformer_max_frames} frames that this Linformer attends to, but {seconds:g} s are "
            f"{frames} frames; time shorter audio"
        )
    target = torch.device(device)
    points = list(_points(config, num_samples))
    for point in points:
        point.module.eval().to(target)
    best: dict[tuple[str, int, int], float] = {}
    whole = float("inf")
    source = 0.1 * torch.randn(1, num_samples, generator=torch.Generator().manual_seed(0))
    encoder = SpeechEncoder(config).eval().to(target)
    bar = tqdm(total=(repeats + 1) * (len(points) + 1), desc="latency", unit=" points", disable=not progress)
    with bar, torch.inference_mode(), threads(num_threads):
        for repeat in range(repeats + 1):
            for point in points:
                time = _time(point, target)
                key = (point.part, point.row, point.column)
                best[key] = time if repeat <= 1 else min(best[key], time)
                bar.update()
            time = seconds_of(lambda: encoder(source.to(target)), target)
            whole = time if repeat <= 1 else min(whole, time)
            bar.update()
        machine = machine_facts(target)
    grids = {}
    for part in dict.fromkeys(point.part for point in points):
        rows = sorted({row for name, row, _ in best if name == part})
        columns = sorted({column for name, _, column in best if name == part})
        grids[part] = Grid(
            tuple(rows), tuple(columns), tuple(tuple(best[part, row, column] for column in columns) for row in rows)
        )
    config = dataclasses.replace(config, group_norm_over_padding=False)
    return LatencyTable(config, grids, whole, num_samples / SAMPLE_RATE, machine)


def _check_parts(config: EncoderConfig) -> None:
    unknown = {
        "time_reduction": config.time_reduction > 1,
        "reuses_attention": any(layer.reuses_attention for layer in config.layers),
        "output": config.output is not None,
        "shared": config.shared != "none",
    }
    found = [name for name, there in unknown.items() if there]
    if found:
        raise ValueError(
            f"a latency table has no parts for encoders with {', '.join(found)}; aim at MACs instead: model.prune_measure=macs"
        )


def machine_facts(device: torch.device) -> dict[str, Any]:
    """What a latency table was measured on."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.is_file() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    facts = {"cpu": model, "cores": os.cpu_count(), "num_threads": torch.get_num_threads(), "torch": torch.__version__}
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
    return {**facts, "device_type": device.type}


def _time(point: _Point, device: torch.device) -> float:
    x = torch.randn(point.shape, device=device)
    return seconds_of(lambda: point.module(x), device)


def _points(config: EncoderConfig, num_samples: int) -> Iterator[_Point]:
    frames, channels_in = num_samples, 1
    for i, shape in enumerate(config.conv_layers):
        default = "group_norm" if i == 0 else "none"
        norm = "layer_norm" if config.extractor_mode == "layer_norm" else default
        for row, column in itertools.product(_sizes(channels_in), _sizes(shape.channels)):
            cut = dataclasses.replace(shape, channels=column)
            module = ConvLayer(row, cut, config.conv_bias, norm)
            yield _Point(f"conv.{i}", row, column, module, (1, row, frames))
        frames, channels_in = (frames - shape.kernel) // shape.stride + 1, shape.channels
    widths = _sizes(config.embed_dim, config.pos_conv_groups)
    for row, column in itertools.product(_sizes(channels_in), widths):
        module = _projection(row, column if config.project_features else None)
        yield _Point("projection", row, column, module, (1, frames, row))
    for row, column in itertools.product(widths, (0, *_sizes(config.embed_dim, config.pos_conv_groups))):
        whole = row == column == config.embed_dim
        pos_conv = PositionalConv(config if whole else _narrow(config, row, column))
        yield _Point("pos_conv", row, column, _Residual(pos_conv), (1, frames, row))
    yield from _layer_points(config, frames, widths)


def _layer_points(config: EncoderConfig, frames: int, widths: list[int]) -> Iterator[_Point]:
    for layer in dict.fromkeys(
        dataclasses.replace(layer, ffn=False, ffn_dim=0) for layer in config.layers if layer.attention
    ):
        for row, column in itertools.product([0, *_sizes(layer.num_heads)] if layer.num_heads else [0], widths):
            cut = dataclasses.replace(layer, num_heads=row, attention=row > 0)
            if layer.position_heads is not None:
                cut = dataclasses.replace(cut, position_heads=layer.position_heads[:row])
            name = f"attention.{layer.num_heads}x{layer.head_dim}"
            yield _Point(name, row, column, _sub_layer(config, cut, column, frames, True), (1, frames, column))
    for dims in dict.fromkeys(layer.ffn_dim for layer in config.layers if layer.ffn):
        for row, column in itertools.product([0, *_sizes(dims)] if dims else [0], widths):
            heads = () if config.position_buckets > 0 else None
            cut = LayerConfig(0, 1, row, attention=False, ffn=row > 0, position_heads=heads)
            yield _Point(
                f"ffn.{dims}", row, column, _sub_layer(config, cut, column, frames, False), (1, frames, column)
            )


def _sizes(full: int, smallest: int = 1) -> list[int]:
    return sorted({min(smallest, full), *(max(smallest, round(share * full)) for share in SHARES)})


def _projection(channels: int, width: int | None) -> nn.Module:
    norm = LayerNorm(channels)
    return norm if width is None else nn.Sequential(norm, bert_linear(channels, width))


class _Residual(nn.Module):
    """x + pos_conv(x)"""

    def __init__(self, pos_conv: PositionalConv) -> None:
        super().__init__()
        self.pos_conv = pos_conv

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pos_conv(x, None)  # type: ignore[no-any-return]


def _narrow(config: EncoderConfig, width: int, outputs: int, layers: tuple[LayerConfig, ...] = ()) -> EncoderConfig:
    """The encoder with a stream of ``width`` channels and ``outputs`` outputs per positional conv."""
    groups, depth = config.pos_conv_groups, config.pos_conv_depth

    def spread(number: int) -> tuple[int, ...]:
        return tuple((number * (g + 1)) // groups - (number * g) // groups for g in range(groups))

    inputs = spread(width)
    starts = itertools.accumulate(inputs, initial=0)
    last = (min(i, o) for i, o in zip(inputs, spread(outputs), strict=True))
    written = tuple(start + i for start, number in zip(starts, last, strict=False) for i in range(number))
    hidden = (spread(outputs if written else 0),) * (depth - 1)
    values: dict[str, Any] = {
        "embed_dim": width,
        "pos_conv_shape": PosConvShape(inputs, hidden, written),
        "layers": layers,
    }
    if not config.project_features:
        last_conv = dataclasses.replace(config.conv_layers[-1], channels=width)
        values["conv_layers"] = (*config.conv_layers[:-1], last_conv)
    if config.position_buckets > 0:
        values |= {"position_channels": tuple(range(width)), "position_slice": config.position_slice_width}
    return dataclasses.replace(config, **values)


def _sub_layer(config: EncoderConfig, layer: LayerConfig, width: int, frames: int, attention: bool) -> nn.Module:
    """A Transformer layer with one of its sub-layers; a post-LN layer has two norms, of which each sub-layer counts one."""
    module = TransformerLayer(_narrow(config, width, width, (layer,)), layer, TrainingConfig())
    if not config.layer_norm_first:
        setattr(module, "final_layer_norm" if attention else "self_attn_layer_norm", nn.Identity())
    return _Layer(module, config.position_heads if layer.attention else 0, frames)


class _Layer(nn.Module):
    """Calls a layer, with the position bias of all heads that a WavLM gives it."""

    bias: Tensor | None

    def __init__(self, layer: TransformerLayer, position_heads: int, frames: int) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("bias", torch.randn(position_heads, frames, frames) if position_heads else None)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, position_bias=self.bias)[0]  # type: ignore[no-any-return]
