"""Cuts an encoder's tensors by a plan; the compact encoder computes what the gated one computed in eval mode.

Where a gate's value goes: conv channels into the next conv's input weights (the last layer's into the LayerNorm behind
it), heads into `out_proj`, FFN dims into `fc2`, whole sub-layers into their output projection and its bias.

WavLM's position bias stays whole, since every layer reads other columns of it: a layer's config says which heads of the
unpruned model it kept.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from s3distill.encoder.config import EncoderConfig, LayerConfig
from s3distill.pruning.plan import Kept, PruningPlan

# what nothing is cut from
WHOLE = ("encoder.pos_conv.", "encoder.layer_norm.", "encoder.relative_attention_bias.", "encoder.time_reduction.")


def cut(config: EncoderConfig, state: dict[str, Tensor], plan: PruningPlan) -> tuple[EncoderConfig, dict[str, Tensor]]:
    """Cuts.

    Args:
        config: shape of the gated encoder.
        state: its parameters by name (see `SpeechEncoder`); left as they are.
    Returns:
        shape and parameters of the compact encoder; the parameters own their memory.
    """
    compact: dict[str, Tensor] = {}
    conv_layers = []
    incoming: Kept | None = None
    for i, (shape, kept) in enumerate(zip(config.conv_layers, plan.conv, strict=True)):
        _cut_conv(compact, state, f"feature_extractor.conv_layers.{i}.", kept, incoming)
        conv_layers.append(dataclasses.replace(shape, channels=len(kept)))
        incoming = kept
    assert incoming is not None
    # the last gate is applied behind this norm, so its scale goes into the affine part: z * (n * w + b)
    for name in ("layer_norm.weight", "layer_norm.bias"):
        compact[name] = state[name][incoming.indices] * incoming.scale
    if config.project_features:
        compact["post_extract_proj.weight"] = state["post_extract_proj.weight"][:, incoming.indices]
        compact["post_extract_proj.bias"] = state["post_extract_proj.bias"]
    layers = []
    for i, layer in enumerate(config.layers):
        shape_after = plan.layer_config(i, layer)
        _cut_layer(compact, state, f"encoder.layers.{i}.", layer, shape_after, plan, i, config.layer_norm_first)
        layers.append(shape_after)
    for name, value in state.items():
        if name == "mask_emb" or name.startswith(WHOLE):
            compact[name] = value
    new_config = dataclasses.replace(config, conv_layers=tuple(conv_layers), layers=tuple(layers))
    return new_config, {name: value.detach().clone().contiguous() for name, value in compact.items()}


def _cut_conv(
    compact: dict[str, Tensor], state: dict[str, Tensor], prefix: str, kept: Kept, incoming: Kept | None
) -> None:
    if (
        prefix + "0.0.weight" in state
    ):  # separable: the depthwise half [C_in, 1, K] is scaled, the pointwise one is cut twice
        assert incoming is not None
        depthwise = state[prefix + "0.0.weight"][incoming.indices]
        compact[prefix + "0.0.weight"] = depthwise * incoming.scale[:, None, None]
        compact[prefix + "0.1.weight"] = state[prefix + "0.1.weight"][kept.indices][:, incoming.indices]
    else:
        weight = state[prefix + "0.weight"][kept.indices]  # [C_out, C_in, K]
        if incoming is not None:
            weight = weight[:, incoming.indices] * incoming.scale[:, None]
        compact[prefix + "0.weight"] = weight
    for name in ("0.bias", "0.1.bias", "2.weight", "2.bias", "2.1.weight", "2.1.bias"):
        if prefix + name in state:
            compact[prefix + name] = state[prefix + name][kept.indices]


def _cut_layer(
    compact: dict[str, Tensor],
    state: dict[str, Tensor],
    prefix: str,
    before: LayerConfig,
    after: LayerConfig,
    plan: PruningPlan,
    index: int,
    layer_norm_first: bool,
) -> None:
    # of layers that share parameters, the owner alone has some to cut
    if after.attention and f"{prefix}self_attn.out_proj.weight" in state:
        kept, scale = plan.heads[index], plan.attention[index]
        # head h owns rows h*D .. h*D+D-1 of q, k, v and the same columns of out_proj
        rows = (kept.indices[:, None] * before.head_dim + torch.arange(before.head_dim)).flatten()
        for name in ("v_proj",) if before.reuses_attention else ("q_proj", "k_proj", "v_proj"):
            compact[f"{prefix}self_attn.{name}.weight"] = state[f"{prefix}self_attn.{name}.weight"][rows]
            compact[f"{prefix}self_attn.{name}.bias"] = state[f"{prefix}self_attn.{name}.bias"][rows]
        columns = state[f"{prefix}self_attn.out_proj.weight"][:, rows]
        compact[f"{prefix}self_attn.out_proj.weight"] = columns * kept.scale.repeat_interleave(before.head_dim) * scale
        compact[f"{prefix}self_attn.out_proj.bias"] = state[f"{prefix}self_attn.out_proj.bias"] * scale
        for name in ("key_frames", "value_frames"):  # Linformer's, which all heads share
            if f"{prefix}self_attn.{name}" in state:
                compact[f"{prefix}self_attn.{name}"] = state[f"{prefix}self_attn.{name}"]
        # the projection of its gate is shared by the heads, its scale is per head
        if before.position_heads is not None and not before.reuses_attention:
            for name in ("grep_linear.weight", "grep_linear.bias"):
                compact[f"{prefix}self_attn.{name}"] = state[f"{prefix}self_attn.{name}"]
            compact[f"{prefix}self_attn.grep_a"] = state[f"{prefix}self_attn.grep_a"][:, kept.indices]
    if after.ffn and f"{prefix}fc1.weight" in state:
        kept, scale = plan.ffn[index], plan.ffn_layers[index]
        compact[f"{prefix}fc1.weight"] = state[f"{prefix}fc1.weight"][kept.indices]
        compact[f"{prefix}fc1.bias"] = state[f"{prefix}fc1.bias"][kept.indices]
        compact[f"{prefix}fc2.weight"] = state[f"{prefix}fc2.weight"][:, kept.indices] * kept.scale * scale
        compact[f"{prefix}fc2.bias"] = state[f"{prefix}fc2.bias"] * scale
    # a pre-LN layer's norm is dead without its sub-layer; a post-LN layer's norm still acts on the residual stream
    for norm, stays in (("self_attn_layer_norm", after.attention), ("final_layer_norm", after.ffn)):
        if (stays or not layer_norm_first) and f"{prefix}{norm}.weight" in state:
            for name in ("weight", "bias"):
                compact[f"{prefix}{norm}.{name}"] = state[f"{prefix}{norm}.{name}"]
