"""How many structures of an encoder there are, may be gated, and are open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from s3distill.encoder.config import EncoderConfig
from s3distill.gates.values import GateValues

UNITS = ("conv", "head", "ffn", "attention_layer", "ffn_layer")
"""What can be pruned: conv channels, attention heads, FFN dims, whole attention sub-layers, whole FFN sub-layers."""

Count: TypeAlias = Tensor | int | float
"""A count or a cost: exact (int), or expected and differentiable (Tensor [])."""


@dataclass(frozen=True)
class GateCounts:
    """How many structures are open, whole or expected numbers.

    Attributes:
        conv: channels per conv layer.
        heads, ffn: heads and FFN dims per Transformer layer, given that their sub-layer is there.
        attention_layers, ffn_layers: per Transformer layer 1 = there, 0 = not, or the probability.
    """

    conv: tuple[Count, ...]
    heads: tuple[Count, ...]
    ffn: tuple[Count, ...]
    attention_layers: tuple[Count, ...]
    ffn_layers: tuple[Count, ...]

    @classmethod
    def full(cls, config: EncoderConfig) -> GateCounts:
        """Everything that the config has."""
        return cls(*structure_sizes(config).values())

    @classmethod
    def from_values(cls, config: EncoderConfig, values: GateValues) -> GateCounts:
        """Counts gates > 0. Heads and FFN dims of a closed sub-layer count 0, as in the pruned model."""
        gates = (values.conv, values.heads, values.ffn, values.attention_layers, values.ffn_layers)
        conv, heads, ffn, attention, ffn_layers = (
            [
                size if gate is None or size == 0 else int((gate > 0).sum())
                for size, gate in zip(sizes, unit, strict=True)
            ]
            for sizes, unit in zip(structure_sizes(config).values(), gates, strict=True)
        )
        heads = [count * there for count, there in zip(heads, attention, strict=True)]
        ffn = [count * there for count, there in zip(ffn, ffn_layers, strict=True)]
        return cls(tuple(conv), tuple(heads), tuple(ffn), tuple(attention), tuple(ffn_layers))

    def as_dict(self) -> dict[str, tuple[Count, ...]]:
        """By the names of `UNITS`."""
        return dict(zip(UNITS, (self.conv, self.heads, self.ffn, self.attention_layers, self.ffn_layers), strict=True))


def structure_sizes(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """Structures per conv or Transformer layer, by the names of `UNITS`; 0 where the sub-layer is not there."""
    return {
        "conv": tuple(conv.channels for conv in config.conv_layers),
        "head": tuple(layer.num_heads if layer.attention else 0 for layer in config.layers),
        "ffn": tuple(layer.ffn_dim if layer.ffn else 0 for layer in config.layers),
        "attention_layer": tuple(int(layer.attention) for layer in config.layers),
        "ffn_layer": tuple(int(layer.ffn) for layer in config.layers),
    }


def prunable_sizes(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """`structure_sizes` of what may be gated.

    Without `post_extract_proj` the last conv layer is the residual stream itself, which stays.
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
