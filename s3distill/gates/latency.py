"""Latency as a size: a table measured on one machine, and a differentiable cost made of it.

`analysis.latency` measures a table, `s3distill latency-table` writes it, and a size target counts by it as by parameters or
MACs: `LatencyTable` is called with the config and the open structures, like `count_parameters`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s3distill.encoder.config import EncoderConfig
from s3distill.gates.cost import stream_width
from s3distill.gates.counts import Count, GateCounts

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Grid:
    """Seconds of one part of the encoder on a grid of two of its sizes, such as inputs and outputs of a convolution.

    Attributes:
        rows, columns: the sizes that were measured, ascending.
        seconds: one row per entry of ``rows``, one column per entry of ``columns``.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        for name, sizes in (("rows", self.rows), ("columns", self.columns)):
            if not sizes or list(sizes) != sorted(set(sizes)):
                raise ValueError(
                    f"`{name}` of a latency grid must be one or more ascending sizes, but are {list(sizes)}"
                )
        if len(self.seconds) != len(self.rows) or any(len(row) != len(self.columns) for row in self.seconds):
            raise ValueError(f"a latency grid of {len(self.rows)} x {len(self.columns)} sizes needs as many times")
        if not all(0 <= value < float("inf") for row in self.seconds for value in row):
            raise ValueError("the times of a latency grid must be finite and at least 0; measure it again")

    def at(self, row: Tensor, column: Tensor) -> Tensor:
        """Bilinear interpolation, exact at what was measured; it follows products of the two sizes exactly within a cell.

        Where a larger size was measured faster than a smaller one, it takes the time of the smaller: cutting never seems to
        cost time, so the size constraint never opens gates to save some. Sizes outside the grid count as its border.

        Args:
            row, column: sizes, [N] float64.
        Returns:
            Seconds, [N] float64, differentiable.
        """
        seconds = torch.tensor(self.seconds, dtype=torch.float64, device=row.device)
        seconds = seconds.cummax(0).values.cummax(1).values
        i, u = _cell(self.rows, row)
        j, v = _cell(self.columns, column)
        up, right = (i + 1).clamp_max(len(self.rows) - 1), (j + 1).clamp_max(len(self.columns) - 1)
        low = seconds[i, j] * (1 - v) + seconds[i, right] * v
        high = seconds[up, j] * (1 - v) + seconds[up, right] * v
        return low * (1 - u) + high * u


def _cell(sizes: tuple[int, ...], value: Tensor) -> tuple[Tensor, Tensor]:
    """Index [N] of the largest size that is not above ``value`` [N], and how far it is to the next, in [0, 1]."""
    if len(sizes) == 1:
        return torch.zeros_like(value, dtype=torch.int64), torch.zeros_like(value)
    edges = torch.tensor(sizes, dtype=torch.float64, device=value.device)
    index = (torch.searchsorted(edges, value.detach().contiguous(), right=True) - 1).clamp(0, len(sizes) - 2)
    share = (value - edges[index]) / (edges[index + 1] - edges[index])
    return index, share.clamp(0, 1)


@dataclass(frozen=True)
class LatencyTable:
    """What the parts of one encoder take on one machine: batch 1, one utterance of ``audio_s`` seconds.

        rtf = scale / audio_s * sum_parts grid(sizes),   scale = whole_s / (the sum with everything open)

    ``scale`` makes the whole encoder take what it was measured to take, with what lies between the parts.

    Attributes:
        config: shape of the encoder.
        grids: by part, see `parts`.
        whole_s: seconds of the whole encoder.
        machine: what it was measured on, for people.
    """

    config: EncoderConfig
    grids: Mapping[str, Grid]
    whole_s: float
    audio_s: float
    machine: Mapping[str, Any]

    def __post_init__(self) -> None:
        needed = {name for name, _, _ in parts(self.config, GateCounts.full(self.config))}
        if set(self.grids) != needed:
            raise ValueError(
                f"a latency table of this encoder needs the parts {sorted(needed)}, but has {sorted(self.grids)}; measure it again"
            )
        if not (self.whole_s > 0 and self.audio_s > 0):
            raise ValueError(
                f"`whole_s` and `audio_s` of a latency table must be positive, but are {self.whole_s} and {self.audio_s}"
            )

    def __str__(self) -> str:
        return "latency"

    def __call__(self, config: EncoderConfig, counts: GateCounts) -> Count:
        """Real-time factor, seconds per second of audio, with these structures open: [] float64, differentiable.

        Raises:
            ValueError: ``config`` is not the one that was measured.
        """
        self.check_config(config)
        return self._sum(counts) * (self._scale / self.audio_s)

    @functools.cached_property
    def _scale(self) -> float:
        return self.whole_s / float(self._sum(GateCounts.full(self.config)))

    def breakdown(self, counts: GateCounts) -> dict[str, float]:
        """Seconds by part, unscaled."""
        return {
            name: float(self.grids[name].at(*_stack_both(rows, columns)).sum())
            for name, rows, columns in parts(self.config, counts)
        }

    def check_config(self, config: EncoderConfig, name: str = "the student") -> None:
        """Raises ValueError where ``config`` has another shape than the encoder of the table."""
        own, other = (dataclasses.replace(c, group_norm_over_padding=False) for c in (self.config, config))
        differing = [f.name for f in dataclasses.fields(own) if getattr(own, f.name) != getattr(other, f.name)]
        if differing:
            shown = ", ".join(f"`{field}`" for field in differing)
            raise ValueError(
                f"the latency table was measured on an encoder of another shape than {name}: {shown} differ (width "
                f"{own.embed_dim} and {own.num_layers} layers in the table, {other.embed_dim} and {other.num_layers} here); run "
                f"`s3distill latency-table` on a checkpoint of {name}, such as that of a run of one update without gates"
            )

    def _sum(self, counts: GateCounts) -> Tensor:
        found = parts(self.config, counts)
        times = [self.grids[name].at(*_stack_both(rows, columns)).sum() for name, rows, columns in found]
        device = next((time.device for time in times if time.device.type != "cpu"), torch.device("cpu"))
        return torch.stack([time.to(device) for time in times]).sum()

    def to_json(self) -> str:
        values = dataclasses.asdict(self)
        return json.dumps({"format_version": FORMAT_VERSION, "kind": "s3distill latency table", **values}, indent=1)

    @classmethod
    def from_json(cls, text: str, name: str = "the latency table") -> LatencyTable:
        """Raises ValueError where ``text`` is not what `to_json` gives; messages call it ``name``."""
        try:
            values = json.loads(text)
            if values.get("kind") != "s3distill latency table" or values.get("format_version") != FORMAT_VERSION:
                raise ValueError(
                    f"`kind` and `format_version` are {values.get('kind')!r} and {values.get('format_version')!r}, where "
                    f"'s3distill latency table' and {FORMAT_VERSION} are read"
                )
            grids = {
                part: Grid(tuple(g["rows"]), tuple(g["columns"]), tuple(map(tuple, g["seconds"])))
                for part, g in values["grids"].items()
            }
            config = EncoderConfig.from_dict(values["config"])
            return cls(config, grids, float(values["whole_s"]), float(values["audio_s"]), values["machine"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{name} is no latency table that can be read ({type(error).__name__}: {error}); write one with "
                "`s3distill latency-table CKPT -o table.json`"
            ) from error


Sizes = list[Count]


def parts(config: EncoderConfig, counts: GateCounts) -> list[tuple[str, Sizes, Sizes]]:
    """The parts of the encoder with the two sizes that each one's time depends on; layers of one shape share a part.

    ``conv.N``: inputs and outputs; ``projection``: conv channels and width; ``pos_conv``: width, and outputs on average over
    the convs of its stack; ``attention...`` and ``ffn...``: heads or FFN dims, 0 = no sub-layer, and width.

    Returns:
        (name, rows, columns), each with one size per layer that the part stands for.
    """
    width = stream_width(config, counts)
    found: list[tuple[str, Sizes, Sizes]] = []
    channels_in: Count = 1
    for i, channels in enumerate(counts.conv):
        found.append((f"conv.{i}", [channels_in], [channels]))
        channels_in = channels
    found.append(("projection", [channels_in], [width]))
    outputs: Count = 0
    for count in counts.pos_conv:
        outputs = outputs + count
    found.append(("pos_conv", [width], [outputs / config.pos_conv_depth]))
    layers: dict[str, Sizes] = {}
    for i, layer in enumerate(config.layers):
        heads, dims = counts.heads[i] * counts.attention_layers[i], counts.ffn[i] * counts.ffn_layers[i]
        if layer.attention:
            layers.setdefault(f"attention.{layer.num_heads}x{layer.head_dim}", []).append(heads)
        if layer.ffn:
            layers.setdefault(f"ffn.{layer.ffn_dim}", []).append(dims)
    return found + [(name, sizes, [width] * len(sizes)) for name, sizes in layers.items()]


def _stack_both(rows: Sequence[Count], columns: Sequence[Count]) -> tuple[Tensor, Tensor]:
    """Both on the device where one of them has tensors."""
    devices = [value.device for value in (*rows, *columns) if isinstance(value, Tensor)]
    device = devices[0] if devices else None
    return _stack(rows, device), _stack(columns, device)


def _stack(values: Sequence[Count], device: torch.device | None = None) -> Tensor:
    """[N] float64"""
    return torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values])
