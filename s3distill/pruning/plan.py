"""The pruning plan: which indices stay, and what each is scaled by, read off the deterministic gates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from s3distill.encoder.config import EncoderConfig, LayerConfig
from s3distill.encoder.pos_shape import groups_of, pos_conv_outputs, stream_groups, written_channels
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
        width: channels of the residual stream.
        pos_conv: outputs per conv of the positional stack; of the last one those that are written to a channel that stays.
    """

    conv: tuple[Kept, ...]
    heads: tuple[Kept, ...]
    ffn: tuple[Kept, ...]
    attention: tuple[float, ...]
    ffn_layers: tuple[float, ...]
    width: Kept
    pos_conv: tuple[Kept, ...]

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
        ValueError: a conv layer, the stream, or a group within the positional convolution would lose every channel, so that no
            signal passes, or layers that share parameters or an attention map have different gates.
    """
    _check_shared(config, gates)
    width = kept(gates.width, config.embed_dim)
    if len(width) == 0:
        raise ValueError(
            f"the residual stream would lose all of its {config.embed_dim} channels; lower criterion.target_sparsity or take 'width' "
            "out of model.prune_units"
        )
    conv = tuple(kept(gate, c.channels) for gate, c in zip(gates.conv, config.conv_layers, strict=True))
    for i, stays in enumerate(conv):
        if len(stays) == 0:
            raise ValueError(
                f"conv layer {i} would lose all of its {config.conv_layers[i].channels} channels; lower criterion.target_sparsity or "
                "take 'conv' out of model.prune_units"
            )
    if not config.project_features and len(conv[-1]) < config.conv_layers[-1].channels:
        raise ValueError(
            "the last conv layer feeds the residual stream directly (no `post_extract_proj`), so its channels cannot be cut; take "
            "'conv' out of model.prune_units"
        )
    if not config.project_features and gates.width is not None:
        conv = (*conv[:-1], width)
    return PruningPlan(
        conv=conv,
        heads=tuple(kept(g, layer.num_heads) for g, layer in zip(gates.heads, config.layers, strict=True)),
        ffn=tuple(kept(g, layer.ffn_dim) for g, layer in zip(gates.ffn, config.layers, strict=True)),
        attention=tuple(_scale(g) for g in gates.attention_layers),
        ffn_layers=tuple(_scale(g) for g in gates.ffn_layers),
        width=width,
        pos_conv=kept_outputs(config, gates),
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


def kept_outputs(config: EncoderConfig, gates: GateValues) -> tuple[Kept, ...]:
    """Outputs of each positional convolution that stay; with those of the last go all that nothing is written of.

    Raises:
        ValueError: a group of a convolution in between would lose every channel.
    """
    sizes = pos_conv_outputs(config)
    written = torch.tensor(written_channels(config), dtype=torch.int64)
    values = gates.positional(None if gates.width is None else written.to(gates.width.device))
    stays = [kept(gate, sum(size)) for gate, size in zip(values or (None,) * len(sizes), sizes, strict=True)]
    if len(stays[-1]) == 0:
        return (stays[-1],) * len(stays)
    groups, inputs = stream_groups(config), kept(gates.width, config.embed_dim).indices
    incoming = set(groups_of(tuple(inputs.tolist()), groups))
    for i, (outgoing, size) in enumerate(zip(stays, sizes, strict=True)):
        owners = set(groups_of(tuple(outgoing.indices.tolist()), size))
        if not owners <= incoming:
            raise ValueError(
                f"groups {sorted(owners - incoming)} of positional convolution {i} would lose all of their inputs; lower "
                "criterion.target_sparsity, or take 'pos_conv' or 'width' out of model.prune_units"
            )
        incoming = owners
    return tuple(stays)


def kept(gate: Tensor | None, size: int) -> Kept:
    """What stays of a vector of gates; None = all of ``size``."""
    if gate is None:
        return Kept(torch.arange(size), torch.ones(size))
    gate = gate.detach().float().cpu()
    indices = torch.nonzero(gate > 0).flatten()
    return Kept(indices, gate[indices])


def _scale(gate: Tensor | None) -> float:
    return 1.0 if gate is None else float(gate)
