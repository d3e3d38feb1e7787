"""Cuts channels of the residual stream and outputs of the positional convolution, so that cut is masked exactly.

Let z in [0, 1]^C be the gates of the stream, and LN_w a LayerNorm whose statistics weight channel c with w_c, w = z in training
and w = [z > 0] in evaluation (see `encoder.layers.LayerNorm`). The gates stand at two places only:

    written   x_0 = z * (P f + b) + GELU(z * conv(x_0)),  mask_emb -> z * mask_emb,  x <- x + z * SubLayer(.)
    normed    z * LN_w(x), for every LayerNorm over the stream, the last one included

Then x_c = 0 wherever z_c = 0, in every hidden state: after the first line and each addition since all terms are 0, after a
norm since z stands behind it. So what reads the stream (projections, heads, the positional convolution, WavLM's gate of the
position bias) reads 0 there, and LN_w counts 0 of it: a channel with z_c = 0 can be left out everywhere, and what is left is
a stream of the open channels with w = 1, an ordinary LayerNorm. A soft gate, 0 < z_c < 1, is a factor of

    the rows (and bias) of P, `out_proj` and `fc2`, of `mask_emb`, and of the rows and bias of the positional convolution,
    the affine part of the norms,  z * (n * w + b) = n * (z * w) + z * b,

into which surgery multiplies it; nothing that reads has to change. Had the gate stood where the stream is read, as conv
channels and FFN dims have theirs, hidden states would not be the same before and after the cut, so that prediction heads
would see something else. (Post-LN layers multiply by z once per norm, as Xia et al., 2022, "Structured Pruning Learns Compact
and Accurate Models", do; in pre-LN layers a channel of the stream itself carries z once.)

Three places need more than that.

* data2vec's stack ends in GELU(LN(.)) without an affine part: there is nothing to fold z into, and z * GELU(n) is not GELU of
  anything linear. There the output is multiplied by w instead of z. Inside the stack the next convolution takes z up.
* Without `post_extract_proj` the last conv layer's channels are the stream's: its gate is z, applied behind the LayerNorm of
  the features as always.
* WavLM's gate of the position bias reads the slice of the stream that a head had before pruning. What is left of the slices
  differs in size, so the compact attention puts its channels back to their old places, with zeros between, for that one small
  projection (8 outputs); the config keeps the old places (`position_channels`).

The groups of the positional convolution lose different numbers of channels: `RaggedConv` has each in its own size. Where they
come out equal the ordinary grouped convolution stays. Weight norm is taken up anew: v = W', g = ||W'|| per kernel position.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from s3distill.encoder.config import EncoderConfig
from s3distill.encoder.pos_shape import (
    PosConvShape,
    group_starts,
    groups_of,
    pos_conv_outputs,
    stream_groups,
    written_channels,
)
from s3distill.encoder.ragged_conv import split_groups
from s3distill.pruning.plan import Kept, PruningPlan


def stream_fields(config: EncoderConfig, plan: PruningPlan) -> dict[str, Any]:
    """Fields of the compact config that say what is left of the stream and of the positional convolution."""
    stays = plan.width.indices
    sizes = [_per_group(stays, stream_groups(config))]
    sizes += [_per_group(k.indices, o) for k, o in zip(plan.pos_conv, pos_conv_outputs(config), strict=True)]
    outputs = torch.tensor(written_channels(config), dtype=torch.int64)[plan.pos_conv[-1].indices]
    written = tuple(torch.searchsorted(stays, outputs).tolist())
    shape: PosConvShape | None = PosConvShape(sizes[0], tuple(sizes[1:-1]), written)
    if not written:
        none = (0,) * config.pos_conv_groups
        shape = PosConvShape(sizes[0], (none,) * (config.pos_conv_depth - 1), ())
    elif len(set(sizes)) == 1 and len(set(sizes[0])) == 1:
        shape = None  # equal groups of the whole stream: an ordinary grouped convolution
    new: dict[str, Any] = {"embed_dim": len(stays), "pos_conv_shape": shape}
    if config.position_buckets > 0 and len(stays) < config.embed_dim:
        channels = range(config.embed_dim) if config.position_channels is None else config.position_channels
        new["position_channels"] = tuple(channels[i] for i in stays.tolist())
        new["position_slice"] = config.position_slice_width
    return new


def cut_pos_conv(
    compact: dict[str, Tensor], state: dict[str, Tensor], config: EncoderConfig, after: EncoderConfig, plan: PruningPlan
) -> None:
    """Adds the positional convolution's parameters that stay to ``compact``."""
    if not _changes(config, plan):
        compact |= {name: value for name, value in state.items() if name.startswith("encoder.pos_conv.")}
        return
    if after.pos_conv_shape is not None and not after.pos_conv_shape.written:
        return
    stack = config.pos_conv_depth > 1
    inputs, incoming = stream_groups(config), Kept(plan.width.indices, torch.ones(len(plan.width)))
    for i, (outputs, outgoing) in enumerate(zip(pos_conv_outputs(config), plan.pos_conv, strict=True)):
        prefix = f"encoder.pos_conv.{i}." + ("0." if stack else "")
        scale = torch.ones(len(outgoing)) if stack else outgoing.scale
        weight = _effective_weight(state, prefix, stack).flatten(0, 1).unsqueeze(1)  # [N, 1, K]
        groups = split_groups(weight, inputs, outputs)
        parts = zip(groups, _local(outgoing.indices, outputs), _local(incoming.indices, inputs), strict=True)
        scales = (
            torch.outer(o, c).unsqueeze(-1)
            for o, c in zip(
                scale.split(_per_group(outgoing.indices, outputs)),
                incoming.scale.split(_per_group(incoming.indices, inputs)),
                strict=True,
            )
        )
        cut = [(w[rows][:, columns] * s).flatten(0, 1) for (w, rows, columns), s in zip(parts, scales, strict=True)]
        _store(compact, prefix, torch.cat(cut).unsqueeze(1), after, stack)
        compact[prefix + "bias"] = state[prefix + "bias"][outgoing.indices] * scale
        inputs, incoming = outputs, outgoing


def cut_heads(heads: dict[str, Tensor], width: Kept) -> dict[str, Tensor]:
    """Prediction heads for the cut stream: they read the channels that are left.

    Args:
        heads: parameters by name, with or without a prefix. In ``predlayer`` mode it is ``hidden`` that reads the stream, else
            each of ``linears``.
    """
    through_hidden = {name.removesuffix("hidden.weight") for name in heads if name.endswith("hidden.weight")}

    def reads_stream(name: str) -> bool:
        prefix, linears, _ = name.rpartition("linears.")
        return name.endswith("hidden.weight") or bool(
            linears and name.endswith("weight") and prefix not in through_hidden
        )

    return {name: value[:, width.indices] if reads_stream(name) else value for name, value in heads.items()}


def cut_ctc_head(head: Mapping[str, Tensor], width: Kept) -> dict[str, Tensor]:
    """A CTC head, ``weight`` [V, C] and ``bias`` [V], for the cut stream; the encoder's output has the gates in it already."""
    return {**head, "weight": head["weight"][:, width.indices].clone()}


def _changes(config: EncoderConfig, plan: PruningPlan) -> bool:
    """Whether anything of the positional convolution is cut or scaled."""
    sizes = (sum(outputs) for outputs in pos_conv_outputs(config))
    whole = len(plan.width) == config.embed_dim and all(
        len(kept) == size for kept, size in zip(plan.pos_conv, sizes, strict=True)
    )
    return not whole or any(bool((kept.scale != 1).any()) for kept in plan.pos_conv)


def _effective_weight(state: dict[str, Tensor], prefix: str, stack: bool) -> Tensor:
    """Rows of outputs, columns of inputs: [outputs, inputs per group, K], or [N, 1, K] where groups differ."""
    if stack:
        return state[prefix + "weight"]
    return torch._weight_norm(state[prefix + "weight_v"], state[prefix + "weight_g"], 2)


def _store(compact: dict[str, Tensor], prefix: str, weight: Tensor, after: EncoderConfig, stack: bool) -> None:
    """``weight`` [N, 1, K] under the names and in the shape of the compact convolution."""
    if after.pos_conv_shape is None:
        # [N, 1, K] -> [C, C/groups, K]: all groups have the same size
        weight = weight.view(after.embed_dim, after.embed_dim // after.pos_conv_groups, weight.shape[-1])
    if stack:
        compact[prefix + "weight"] = weight
        return
    norm = weight.norm(dim=(0, 1), keepdim=True)
    # a position without any weight has no direction: any v with g = 0 stands for it
    compact[prefix + "weight_v"] = torch.where(norm > 0, weight, torch.ones_like(weight))
    compact[prefix + "weight_g"] = norm


def _per_group(indices: Tensor, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """How many of ``indices`` [K] fall into each group."""
    owners = groups_of(tuple(indices.tolist()), sizes)
    return tuple(owners.count(group) for group in range(len(sizes)))


def _local(indices: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    """``indices`` [K], ascending, per group, counted from where the group begins."""
    starts = group_starts(sizes)
    parts = indices.split(_per_group(indices, sizes))
    return [part - start for part, start in zip(parts, starts, strict=False)]
