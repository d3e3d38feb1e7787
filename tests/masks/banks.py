"""Small backbones and hand-made bank entries for the tests of the bank; no fairseq."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from s3distill.encoder.checkpoint import ParsedCheckpoint
from s3distill.encoder.config import ConvLayerConfig, EncoderConfig, uniform_layers
from s3distill.encoder.model import SpeechEncoder
from s3distill.masks.bank import BankEntry

CONFIG = EncoderConfig(
    conv_layers=(ConvLayerConfig(8, 10, 5), ConvLayerConfig(8, 8, 4), ConvLayerConfig(8, 4, 4)),
    embed_dim=16,
    layers=uniform_layers(2, 2, 8, 24),
    extractor_mode="layer_norm",
    conv_bias=True,
    layer_norm_first=True,
    pos_conv_kernel=8,
    pos_conv_groups=2,
)
SYMBOLS = ["<s>", "<pad>", "</s>", "<unk>", "|", "é", "语"]
FFN = tuple(f"w2v_model.encoder.layers.{i}.{fc}" for i in range(2) for fc in ("fc1", "fc2"))
# a module of every kind: attention, projection, conv of the extractor, weight-normed conv, head
KINDS = (
    *FFN,
    "w2v_model.encoder.layers.1.self_attn.k_proj",
    "w2v_model.post_extract_proj",
    "w2v_model.feature_extractor.conv_layers.1.0",
    "w2v_model.encoder.pos_conv.0",
    "proj",
)


@functools.cache
def make_backbone(seed: int = 0, config: EncoderConfig = CONFIG) -> ParsedCheckpoint:
    """A pre-trained checkpoint with random weights; shared by the tests, so not to be changed."""
    torch.manual_seed(seed)
    encoder = SpeechEncoder(config)
    for parameter in encoder.parameters():  # biases and norms too
        parameter.data.add_(0.05 * torch.randn(parameter.shape))
    state = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    return ParsedCheckpoint(family="wav2vec2", config=config, encoder_state=state, normalize=False)


NUM_PARAMETERS = sum(tensor.numel() for tensor in make_backbone().encoder_state.values())


def weight_shape(backbone: ParsedCheckpoint, module: str) -> tuple[int, ...]:
    if module == "proj":
        return len(SYMBOLS), backbone.config.embed_dim
    key = f"{module.removeprefix('w2v_model.')}.weight"
    return tuple(backbone.encoder_state.get(key, backbone.encoder_state.get(f"{key}_v")).shape)


def make_entry(
    name: str = "nl",
    seed: int = 1,
    backbone: ParsedCheckpoint | None = None,
    modules: tuple[str, ...] = FFN,
    trained: tuple[str, ...] = ("mask_emb",),
    symbols: list[str] | None = SYMBOLS,
    dtype: torch.dtype = torch.float32,
    density: float = 0.5,
    **info: Any,
) -> BankEntry:
    """An entry with random masks, a random head, and the ``trained`` tensors moved."""
    backbone = backbone or make_backbone()
    generator = torch.Generator().manual_seed(seed)

    def noise(shape: Any) -> Tensor:
        return torch.randn(shape, generator=generator)

    masks = {m: torch.rand(weight_shape(backbone, m), generator=generator) < density for m in modules}
    pattern = info.get("pattern")
    if pattern in ("rows", "columns"):
        masks = {
            m: (mask[:, :1] if mask.dim() == 2 else mask[:, :1, :1]).expand(mask.shape)
            if pattern == "rows"
            else (mask[:1] if mask.dim() == 2 else mask[:1, :, :1]).expand(mask.shape)
            for m, mask in masks.items()
        }
    tensors = {
        f"w2v_model.{t}": backbone.encoder_state[t] + 0.1 * noise(backbone.encoder_state[t].shape) for t in trained
    }
    width = backbone.config.embed_dim
    tensors |= {"proj.weight": noise((len(SYMBOLS), width)), "proj.bias": noise((len(SYMBOLS),))}
    dtypes = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
    facts = {"density": density, "pattern": "unstructured", "normalize": False, "weights_dtype": dtypes[dtype]}
    return BankEntry(name, masks, {n: t.to(dtype) for n, t in tensors.items()}, symbols, facts | info)
