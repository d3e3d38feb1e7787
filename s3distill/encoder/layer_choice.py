"""Which layers of a teacher a student starts from: shape and weights of the encoder that is left."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from s3distill.encoder.config import EncoderConfig

EXTRACTOR = ("feature_extractor.", "layer_norm.")  # the convolutions, and the LayerNorm over their channels
NO_LAYERS = "none"
_LAYERS = "encoder.layers."


def parse_layer_choice(
    text: str, num_layers: int, option: str = "init_layers", may_be_none: bool = True
) -> tuple[int, ...]:
    """Reads which Transformer layers to take, 0-based and in the order that they are to have.

    Args:
        text: ``first:2`` (the first two), ``every:4`` (layers 0, 4, 8, ...) or a list such as ``0,4,8``.
        num_layers: layers that there are.
        option: what messages call it; may_be_none: whether they name ``none``, which the caller reads.
    Raises:
        ValueError: it reads like none of them, or names a layer that is not there.
    """
    kind, _, number = text.partition(":")
    try:
        if kind == "first":
            layers = tuple(range(int(number)))
        elif kind == "every":
            layers = tuple(range(0, num_layers, int(number)))
        else:
            layers = tuple(int(item) for item in text.split(","))
    except ValueError as error:
        forms = f"'every:4', '0,4,8' or '{NO_LAYERS}'" if may_be_none else "'every:4' or '0,4,8'"
        raise ValueError(f"`{option}` must read like 'first:2', {forms}, but is {text!r}") from error
    lacking = [layer for layer in layers if not 0 <= layer < num_layers]
    if not layers or lacking:
        raise ValueError(
            f"`{option}` must name one or more of the layers 0 to {num_layers - 1} that there are, but {text!r} is "
            f"{f'layers {lacking}, which are lacking' if lacking else 'no layer'}; correct it"
        )
    return layers


def take_layers(
    config: EncoderConfig, state: Mapping[str, Tensor], layers: tuple[int, ...]
) -> tuple[EncoderConfig, dict[str, Tensor]]:
    """The encoder with these layers only; extractor, projection, positional convolution and norms stay as they are.

    Args:
        state: its parameters by name (see `SpeechEncoder`).
        layers: 0-based; a layer may be taken twice.
    Returns:
        shape and parameters; the tensors are those of ``state``.
    Raises:
        ValueError: the encoder has prediction heads at its output, which belong to its last layer, or layers that share.
    """
    if config.output is not None:
        raise ValueError(
            "layers cannot be taken out of a model that keeps its prediction heads (s3distill keep-heads); start from the student that "
            "it was made of"
        )
    if config.shared != "none" or any(layer.reuses_attention for layer in config.layers):
        raise ValueError(
            "layers cannot be taken out of a model whose layers share parameters or attention maps (`shared`, `reuses_attention`): a "
            "layer alone would lack its part; start from all of it"
        )
    taken = {name: value for name, value in state.items() if not name.startswith(_LAYERS)}
    for new, old in enumerate(layers):
        prefix = f"{_LAYERS}{old}."
        taken |= {f"{_LAYERS}{new}.{n.removeprefix(prefix)}": v for n, v in state.items() if n.startswith(prefix)}
    return dataclasses.replace(config, layers=tuple(config.layers[layer] for layer in layers)), taken


def take_extractor(
    config: EncoderConfig, state: Mapping[str, Tensor], rest: EncoderConfig
) -> tuple[EncoderConfig, dict[str, Tensor]]:
    """The extractor of ``config``, with everything behind it in the shape of ``rest``.

    Returns:
        shape, and the extractor's parameters alone, the LayerNorm over its channels included.
    """
    shape = dataclasses.replace(
        rest,
        conv_layers=config.conv_layers,
        extractor_mode=config.extractor_mode,
        conv_bias=config.conv_bias,
        project_features=rest.project_features or config.conv_layers[-1].channels != rest.embed_dim,
    )
    return shape, {name: value for name, value in state.items() if name.startswith(EXTRACTOR)}
