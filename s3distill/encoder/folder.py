"""s3distill's own folders, config.json and model.safetensors: what they hold, read and written.

`s3distill.load(folder)` reads one; it needs neither fairseq nor pickle. Shapes of any student are in it, pruned ones too,
which `transformers` has no model for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from s3distill.encoder.config import SAMPLE_RATE, EncoderConfig
from s3distill.encoder.layout import checkpoint_layout
from s3distill.encoder.options import FAMILIES, options_from_config

MODEL_TYPE = "s3distill"  # `model_type` in config.json
FORMAT_VERSION = 1
_HEAD, _GATES = "head.", "gates."


def to_folder(
    config: EncoderConfig,
    family: str,
    encoder_state: Mapping[str, Tensor],
    normalize: bool,
    head_state: Mapping[str, Tensor] | None = None,
    symbols: Sequence[str] | None = None,
    pooled: bool = False,
    gates: Mapping[str, Tensor] | None = None,
    prune_units: Sequence[str] = (),
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What config.json and model.safetensors hold.

    Args:
        gates: L0 gates of a student that was not pruned yet, and ``prune_units`` their units; see `GateSet`.
    """
    head = None
    if head_state is not None:
        head = {"kind": "classes" if pooled else "ctc", "symbols": None if symbols is None else list(symbols)}
    contents = {
        **{"model_type": MODEL_TYPE, "format_version": FORMAT_VERSION, "family": family, "sample_rate": SAMPLE_RATE},
        **{"normalize": normalize, "head": head, "prune_units": list(prune_units), "encoder": config.to_dict()},
    }
    tensors = dict(encoder_state)
    tensors |= {f"{_HEAD}{key}": value for key, value in (head_state or {}).items()}
    tensors |= {f"{_GATES}{key}": value for key, value in (gates or {}).items()}
    return contents, tensors


def from_folder(contents: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """The layout of a fairseq checkpoint of what `to_folder` gave.

    Raises:
        ValueError: a newer format, or a damaged config.json.
    """
    version = contents.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{name} has format_version {version!r} in its config.json, but this s3distill reads {FORMAT_VERSION}; was it written by a "
            "newer one? Then upgrade"
        )
    family = contents.get("family")
    if family not in FAMILIES:
        raise ValueError(f"`family` in config.json of {name} must be one of {', '.join(FAMILIES)}, but is {family!r}")
    normalize = bool(contents["normalize"])
    options = options_from_config(EncoderConfig.from_dict(contents["encoder"]), family, normalize)
    gates = {key: value for key, value in tensors.items() if key.startswith(_GATES)}
    head_state = {key.removeprefix(_HEAD): v for key, v in tensors.items() if key.startswith(_HEAD)}
    encoder_state = {key: v for key, v in tensors.items() if not key.startswith((_HEAD, _GATES))}
    head = contents.get("head")
    if gates:
        options["prune_units"] = list(contents.get("prune_units") or [])
    if head is None:
        return checkpoint_layout(options, encoder_state, normalize, extra_state=gates)
    if {"weight", "bias"} - set(head_state):
        raise ValueError(
            f"{name} has a head by its config.json, but no head.weight and head.bias; was it copied whole?"
        )
    symbols = head.get("symbols")
    return checkpoint_layout(options, encoder_state, normalize, head_state, symbols, head["kind"] == "classes", gates)
