"""The pruning plan: which indices stay, and what each is scaled by, read off the deterministic gates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from s3distill.encoder.config import EncoderConfig, LayerConfig
from s3distill.encoder.variants import gate_owners
from s3distill.gates.values import GateValues


@dataclass(frozen=True)
class Kept:
    """The structures of one group that stay.

    Attributes:
        indices: positions in the uncut group, ascending, [K] int64.
        scale: gate values of the kept ones, [K] float32; surgery folds them into the weights behind.
    """

    indices: Tensor
    scale: Tensor

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True)
class PruningPlan:
    """What stays of an encoder.

    Attributes:
        conv: channels per conv layer.
        heads: attention heads per Transformer layer.
        ffn: FFN dims per Transformer layer.
        attention: scale of the whole attention sub-layer per layer; 0 = the sub-layer goes.
        ffn_layers: scale of the whole FFN sub-layer per layer; 0 = the sub-layer goes.
    """

    conv: tuple[Kept, ...]
    heads: tuple[Kept, ...]
    ffn: tuple[Kept, ...]
    attention: tuple[float, ...]
    ffn_layers: tuple[float, ...]

    def layer_config(self, index: int, layer: LayerConfig) -> LayerConfig:
        """Shape of Transformer layer ``index`` after the cut; ``layer`` is its shape before."""
        attention = layer.attention and self.attention[index] > 0
        ffn = layer.ffn and self.ffn_layers[index] > 0
        heads = self.heads[index].indices.tolist() if attention else []
        numbers = layer.position_heads  # of the unpruned model: what is pruned again goes by them still
        return LayerConfig(
            num_heads=len(heads),
            head_dim=layer.head_dim,
            ffn_dim=len(self.ffn[index]) if ffn else 0,
            attention=attention,
            ffn=ffn,
            position_heads=None if numbers is None else tuple(numbers[head] for head in heads),
            reuses_attention=layer.reuses_attention and attention,
        )


def plan_from_gates(config: EncoderConfig, gates: GateValues) -> PruningPlan:
    """Open gates stay, closed ones (exactly 0) go.

    Args:
        config: shape of the gated encoder.
        gates: its deterministic gate values.
    Raises:
        ValueError: a conv layer would lose every channel, so that no signal passes, or layers that share parameters or an
            attention map have different gates.
    """
    _check_shared(config, gates)
    conv = tuple(_kept(gate, c.channels) for gate, c in zip(gates.conv, config.conv_layers, strict=True))
    for i, kept in enumerate(conv):
        if len(kept) == 0:
            raise ValueError(
                f"conv layer {i} would lose all of its {config.conv_layers[i].channels} channels; lower criterion.target_sparsity or "
                "take 'conv' out of model.prune_units"
            )
    if not config.project_features and len(conv[-1]) < config.conv_layers[-1].channels:
        raise ValueError(
            "the last conv layer feeds the residual stream directly (no `post_extract_proj`), so its channels cannot be cut; take "
            "'conv' out of model.prune_units"
        )
    return PruningPlan(
        conv=conv,
        heads=tuple(_kept(g, layer.num_heads) for g, layer in zip(gates.heads, config.layers, strict=True)),
        ffn=tuple(_kept(g, layer.ffn_dim) for g, layer in zip(gates.ffn, config.layers, strict=True)),
        attention=tuple(_scale(g) for g in gates.attention_layers),
        ffn_layers=tuple(_scale(g) for g in gates.ffn_layers),
    )


def _check_shared(config: EncoderConfig, gates: GateValues) -> None:
    units = {
        "head": gates.heads,
        "ffn": gates.ffn,
        "attention_layer": gates.attention_layers,
        "ffn_layer": gates.ffn_layers,
    }
    for unit, values in units.items():
        for i, first in enumerate(gate_owners(config, unit)):
            own, others = values[i], values[first]
            if (own is None) != (others is None) or (own is not None and not torch.equal(own, others)):  # type: ignore[arg-type]
                raise ValueError(
                    f"layers {first} and {i} share parameters or an attention map, so their gates of {unit} must be the same, but "
                    "differ; take them from a `GateSet` of this encoder"
                )


def _kept(gate: Tensor | None, size: int) -> Kept:
    if gate is None:
        return Kept(torch.arange(size), torch.ones(size))
    gate = gate.detach().float().cpu()
    indices = torch.nonzero(gate > 0).flatten()
    return Kept(indices, gate[indices])


def _scale(gate: Tensor | None) -> float:
    return 1.0 if gate is None else float(gate)
