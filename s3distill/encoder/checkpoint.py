"""Reads what a checkpoint says: encoder shape, weights, masks, head, dictionary, waveform normalisation.

Takes the plain dict that `s3distill.compat.load_checkpoint` returns, so it needs neither fairseq nor omegaconf.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from s3distill.encoder.config import EncoderConfig
from s3distill.encoder.huggingface import from_huggingface
from s3distill.encoder.model import PARAMETER_PREFIXES
from s3distill.encoder.options import FAMILIES, config_from_options

__all__ = ["FAMILIES", "ParsedCheckpoint", "config_from_options", "parse_checkpoint"]

# registered names of models whose head has one output per utterance; every other head has one per frame
POOLED_MODELS = ("wav2vec_label_st",)

# WavLM's files hold the bias of all layers in layer 0's attention, which pruning may remove
_MOVED = {
    "encoder.layers.0.self_attn.relative_attention_bias.weight": "encoder.relative_attention_bias.weight",
}


@dataclass
class ParsedCheckpoint:
    """A checkpoint, taken apart.

    Attributes:
        family: one of `FAMILIES`.
        config: shape of the encoder.
        encoder_state: its parameters, by their names in `SpeechEncoder`.
        normalize: whether waveforms are normalised to zero mean and unit variance.
        head_state: ``weight`` [V, C] and ``bias`` [V] of the head, or None.
        pooled: whether that head is for the mean over an utterance's frames (classification), not for each frame (CTC).
        extra_state: every other parameter of the model (pre-training heads, gates, ...).
        symbols: dictionary or classes of the head, index = position, or None.
        scores: scores of S3-Router's masks by module, named as below ``w2v_encoder``; empty for a model without.
        model_name: the registered name that wrote the file, e.g. ``wav2vec_ctc``.
        model_options: options of that model as its config has them.
        pretraining_options: options of the encoder model as its config has them.
    """

    family: str
    config: EncoderConfig
    encoder_state: dict[str, Tensor]
    normalize: bool
    head_state: dict[str, Tensor] | None = None
    pooled: bool = False
    extra_state: dict[str, Tensor] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)
    symbols: list[str] | None = None
    model_name: str = ""
    model_options: dict[str, Any] = field(default_factory=dict)
    pretraining_options: dict[str, Any] = field(default_factory=dict)

    @property
    def student_options(self) -> dict[str, Any]:
        """Options of heads and gates: those of a fine-tuned student, where it is one, else of the encoder model."""
        return self.model_options if "prune_units" in self.model_options else self.pretraining_options


def parse_checkpoint(state: Mapping[str, Any], name: str = "the checkpoint") -> ParsedCheckpoint:
    """Takes apart a checkpoint of a supported encoder, pre-trained or fine-tuned.

    fairseq's with ``cfg`` or ``args``, WavLM's with its options flat in ``cfg``, or a folder as `compat.load_checkpoint`
    reads it.

    Args:
        state: plain containers and tensors (see `s3distill.compat.load_checkpoint`).
        name: what messages call the file.
    Raises:
        ValueError: it is not a checkpoint, not of a supported model, or its config is damaged.
    """
    try:
        return _parse(state, name)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{name} has a config that cannot be read ({type(error).__name__}: {error}); it must be what fairseq or s3distill wrote"
        ) from error


def _parse(state: Mapping[str, Any], name: str) -> ParsedCheckpoint:
    if "huggingface" in state:
        state = from_huggingface(state, name)
    weights = state.get("model")
    if not isinstance(weights, Mapping) or not weights:
        raise ValueError(
            f"{name} holds no model weights: it must be a fairseq checkpoint with the key 'model', but has "
            f"{sorted(map(str, state))[:8]}"
        )
    model_options, task_options = _options(state, name)
    model_name = str(model_options.get("_name") or model_options.get("arch") or "")
    encoder_options = model_options
    if model_options.get("w2v_args"):  # fine-tuned: the encoder's own options are nested
        nested = model_options["w2v_args"]
        encoder_options = nested["model"] if isinstance(nested.get("model"), Mapping) else nested
        if isinstance(nested.get("task"), Mapping):
            task_options = {
                **nested["task"],
                "normalize": task_options.get("normalize", nested["task"].get("normalize")),
            }
        elif "normalize" not in task_options:
            task_options = {**task_options, "normalize": nested.get("normalize")}
    family = _family(encoder_options, weights, name)
    scores = {
        key.removeprefix("w2v_encoder.").removesuffix(".scores"): value
        for key, value in weights.items()
        if key.startswith("w2v_encoder.") and key.endswith(".scores")
    }
    encoder_state, extra_state = _split_weights({k: v for k, v in weights.items() if not k.endswith(".scores")})
    head_state = {
        k.rpartition(".")[2]: extra_state[k]
        for k in extra_state
        if k in ("w2v_encoder.proj.weight", "w2v_encoder.proj.bias")
    }
    normalize = task_options.get("normalize")
    return ParsedCheckpoint(
        family=family,
        config=config_from_options(encoder_options, family),
        encoder_state=encoder_state,
        normalize=bool(encoder_options.get("normalize", False) if normalize is None else normalize),
        head_state=head_state if {"weight", "bias"} <= set(head_state) else None,
        pooled=model_name in POOLED_MODELS,
        extra_state={k: v for k, v in extra_state.items() if not k.startswith("w2v_encoder.proj.")},
        scores=scores,
        symbols=_symbols(state),
        model_name=model_name,
        model_options=model_options,
        pretraining_options=dict(encoder_options),
    )


def _options(state: Mapping[str, Any], name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Model and task options of a checkpoint with ``cfg`` (nested, or WavLM's: flat) or ``args`` (flat)."""
    cfg = state.get("cfg")
    if isinstance(cfg, Mapping) and isinstance(cfg.get("model"), Mapping):
        return dict(cfg["model"]), dict(cfg.get("task") or {})
    if isinstance(cfg, Mapping) and "encoder_layers" in cfg:  # WavLM's files: the options stand in `cfg` itself
        return {"_name": "wavlm", **cfg}, dict(cfg)
    args = state.get("args")
    if isinstance(args, Mapping):
        return {**args, "_name": args.get("arch")}, dict(args)
    raise ValueError(
        f"{name} carries neither 'cfg' nor 'args', so its shape is unknown; s3distill reads checkpoints that fairseq wrote. "
        "Convert it with the tool of its origin first"
    )


def _family(options: Mapping[str, Any], weights: Mapping[str, Any], name: str) -> str:
    model_name = str(options.get("_name") or options.get("arch") or "")
    for family in FAMILIES:
        if model_name == family or (model_name and model_name.startswith(family + "_")):
            return family
    if not any("feature_extractor.conv_layers.0.0.weight" in key for key in weights):
        raise ValueError(
            f"{name} is of model {model_name!r}, which has no wav2vec 2.0-style encoder; supported are {', '.join(FAMILIES)} "
            "and models that were fine-tuned from them"
        )
    return "wav2vec2"


def _split_weights(weights: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Encoder parameters under their own names, and the rest under the names in the file."""
    prefix = next((p for p in ("w2v_encoder.w2v_model.", "w2v_encoder.", "encoder.w2v_model.") if _has(weights, p)), "")
    encoder, extra = {}, {}
    for key, value in weights.items():
        if not isinstance(value, Tensor):
            continue  # e.g. data2vec's "_ema", a dict of the pre-training teacher
        inner = key.removeprefix(prefix)
        if key.startswith(prefix) and inner.startswith(PARAMETER_PREFIXES):
            encoder[_MOVED.get(inner, inner)] = value
        else:
            extra[key] = value
    return encoder, extra


def _has(weights: Mapping[str, Any], prefix: str) -> bool:
    return f"{prefix}feature_extractor.conv_layers.0.0.weight" in weights


def _symbols(state: Mapping[str, Any]) -> list[str] | None:
    task_state = state.get("task_state")
    if isinstance(task_state, Mapping):
        dictionary = task_state.get("target_dictionary")
        if isinstance(dictionary, Mapping) and "symbols" in dictionary:
            return [str(s) for s in dictionary["symbols"]]
        if task_state.get("classes") is not None:
            return [str(name) for name in task_state["classes"]]
    return None
