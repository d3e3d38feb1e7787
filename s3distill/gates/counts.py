"""How many structures of an encoder there are, may be gated, and are open."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from s3distill.encoder.config import EncoderConfig
from s3distill.encoder.pos_shape import pos_conv_outputs, stream_groups, written_channels
from s3distill.gates.values import GateValues

UNITS = ("conv", "head", "ffn", "attention_layer", "ffn_layer", "width", "pos_conv")
"""What can be pruned: conv channels, attention heads, FFN dims, whole attention sub-layers, whole FFN sub-layers, channels of
the residual stream (one vector of gates per group of the positional convolution), outputs of the positional convolution."""

MIN_OPEN = {"conv": 1, "head": 0, "ffn": 0, "attention_layer": 0, "ffn_layer": 0, "width": 1, "pos_conv": 1}
"""A conv layer, and each group of the stream and of the positional convolution, always keeps one channel: without any, no signal
would reach what lies behind."""

Count: TypeAlias = Tensor | int | float
"""A count or a cost: exact (int), or expected and differentiable (Tensor [])."""


@dataclass(frozen=True)
class GateCounts:
    """How many structures are open, whole or expected numbers.

    Attributes:
        conv: channels per conv layer.
        heads, ffn: heads and FFN dims per Transformer layer, given that their sub-layer is there.
        attention_layers, ffn_layers: per Transformer layer 1 = there, 0 = not, or the probability.
        width: channels of the residual stream per group of the positional convolution; () = as the config has.
        pos_conv: outputs of the positional convolutions, per conv and group (conv 0's groups first), of the last one those whose
            channel of the stream is open too; () = as the config has.
    """

    conv: tuple[Count, ...]
    heads: tuple[Count, ...]
    ffn: tuple[Count, ...]
    attention_layers: tuple[Count, ...]
    ffn_layers: tuple[Count, ...]
    width: tuple[Count, ...] = ()
    pos_conv: tuple[Count, ...] = ()

    @classmethod
    def full(cls, config: EncoderConfig) -> GateCounts:
        """Everything that the config has."""
        return cls(*structure_sizes(config).values())

    @classmethod
    def from_values(cls, config: EncoderConfig, values: GateValues) -> GateCounts:
        """Counts gates > 0. Heads and FFN dims of a closed sub-layer count 0, as in the pruned model."""
        gates = (values.conv, values.heads, values.ffn, values.attention_layers, values.ffn_layers)
        sizes = structure_sizes(config)
        conv, heads, ffn, attention, ffn_layers = (
            [
                size if gate is None or size == 0 else int((gate > 0).sum())
                for size, gate in zip(unit_sizes, unit, strict=True)
            ]
            for unit_sizes, unit in zip(sizes.values(), gates, strict=False)  # the units of one gate vector per layer
        )
        heads = [count * there for count, there in zip(heads, attention, strict=True)]
        ffn = [count * there for count, there in zip(ffn, ffn_layers, strict=True)]
        width, pos_conv = stream_counts(
            config,
            None if values.width is None else (values.width > 0).double(),
            [None if gate is None else (gate > 0).double() for gate in values.pos_conv],
        )
        counts = cls(*map(tuple, (conv, heads, ffn, attention, ffn_layers)))  # type: ignore[arg-type]
        whole = [tuple(int(count) for count in unit) for unit in (width, pos_conv)]
        return dataclasses.replace(counts, width=whole[0], pos_conv=whole[1]).tied(config)

    def tied(self, config: EncoderConfig) -> GateCounts:
        """Without `post_extract_proj` the last conv layer's channels are the stream's."""
        if config.project_features or not self.width:
            return self
        return dataclasses.replace(self, conv=(*self.conv[:-1], sum(self.width)))

    def as_dict(self) -> dict[str, tuple[Count, ...]]:
        """By the names of `UNITS`."""
        layers = (self.conv, self.heads, self.ffn, self.attention_layers, self.ffn_layers)
        return dict(zip(UNITS, (*layers, self.width, self.pos_conv), strict=True))


def structure_sizes(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """Structures per conv or Transformer layer, by the names of `UNITS`; 0 where the sub-layer is not there."""
    return {
        "conv": tuple(conv.channels for conv in config.conv_layers),
        "head": tuple(layer.num_heads if layer.attention else 0 for layer in config.layers),
        "ffn": tuple(layer.ffn_dim if layer.ffn else 0 for layer in config.layers),
        "attention_layer": tuple(int(layer.attention) for layer in config.layers),
        "ffn_layer": tuple(int(layer.ffn) for layer in config.layers),
        "width": stream_groups(config),
        "pos_conv": tuple(size for conv in pos_conv_outputs(config) for size in conv),
    }


def stream_counts(
    config: EncoderConfig, width: Tensor | None, pos_conv: Sequence[Tensor | None]
) -> tuple[tuple[Count, ...], tuple[Count, ...]]:
    """`GateCounts.width` and ``pos_conv`` from how probably each channel is open (or 0 and 1).

    An output of the last positional convolution stays where its own gate and that of its channel of the stream are open, which
    are independent: the product of both.

    Args:
        width: [C], or None = ungated.
        pos_conv: per conv [outputs] or None; empty = ungated.
    """
    groups, outputs = stream_groups(config), pos_conv_outputs(config)
    stream = groups if width is None else tuple(part.sum() for part in width.split(groups))
    counts: list[Count] = []
    gates = [*pos_conv] or [None] * len(outputs)
    for i, (sizes, gate) in enumerate(zip(outputs, gates, strict=True)):
        if i == len(outputs) - 1 and width is not None:
            written = width[torch.tensor(written_channels(config), dtype=torch.int64, device=width.device)]
            gate = written if gate is None else gate * written
        counts += sizes if gate is None else [part.sum() for part in gate.split(sizes)]
    return stream, tuple(counts)


def prunable_sizes(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """`structure_sizes` of what may be gated.

    Without `post_extract_proj` the channels of the last conv layer are those of the residual stream, `width`.
    """
    sizes = structure_sizes(config)
    if not config.project_features:
        sizes["conv"] = (*sizes["conv"][:-1], 0)
    return sizes


def check_units(units: Sequence[str]) -> None:
    """Raises ValueError, naming the valid units, where ``units`` is empty, repeats a unit or has an unknown one."""
    unknown = [unit for unit in units if unit not in UNITS]
    if unknown or not units or len(set(units)) != len(units):
        raise ValueError(
            f"the units to prune must be one or more different ones of {', '.join(UNITS)}, but are {list(units)}"
        )
