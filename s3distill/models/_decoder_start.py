"""Where the decoder of a student starts from: layers of a trained decoder, as Distil-Whisper does (Gandhi et al., 2023)."""

# no `from __future__ import annotations`: used by files whose config fields fairseq reads
import logging
from typing import Any, Dict, List, Mapping, Tuple

from fairseq.data import Dictionary
from torch import Tensor, nn

from s3distill import compat
from s3distill.encoder.checkpoint import ParsedCheckpoint, parse_checkpoint
from s3distill.encoder.layer_choice import parse_layer_choice

logger = logging.getLogger(__name__)

_DECODER, _LAYERS = "decoder.", "layers."
# options that decide which parameters there are and what they compute, with the defaults of fairseq's files that leave them out
_SHAPE: Dict[str, Any] = {
    "decoder_embed_dim": 768,
    "decoder_ffn_embed_dim": 3072,
    "decoder_attention_heads": 4,
    "max_target_positions": 2048,
    "decoder_learned_pos": False,
    "decoder_normalize_before": False,
    "no_token_positional_embeddings": False,
    "share_decoder_input_output_embed": False,
}


def read_decoder(path: str) -> Tuple[ParsedCheckpoint, Dict[str, Tensor], int]:
    """A checkpoint with a decoder, the decoder's parameters by name, and its number of layers.

    Raises:
        FileNotFoundError, ValueError: see `parse_checkpoint`; or the model has no decoder.
    """
    parsed = parse_checkpoint(compat.load_checkpoint(path), path)
    state = {k.removeprefix(_DECODER): v for k, v in parsed.extra_state.items() if k.startswith(_DECODER)}
    numbers = {int(name.split(".")[1]) for name in state if name.startswith(_LAYERS)}
    if not numbers or "embed_tokens.weight" not in state:
        raise ValueError(
            f"{path} must be of a model with a decoder, such as wav2vec_seq2seq, but is of {parsed.model_name!r}, which has none; "
            "name one that was trained with task.autoregressive=true"
        )
    return parsed, state, max(numbers) + 1


def check_dictionary(parsed: ParsedCheckpoint, dictionary: Dictionary, path: str) -> None:
    """Teacher and student must give their symbols the same numbers.

    Raises:
        ValueError: with what differs.
    """
    if parsed.symbols is None:
        raise ValueError(
            f"{path} holds no dictionary, so what its outputs mean is unknown; name the training's own file"
        )
    theirs, own = parsed.symbols, list(dictionary.symbols)
    if theirs == own:
        return
    differing = sorted(set(theirs) ^ set(own))
    told = f"{', '.join(map(repr, differing[:8]))} in one of them only" if differing else "their order differs"
    raise ValueError(
        f"the dictionary of task.data must be that of {path}, whose {len(theirs)} symbols would else mean other ones, but has "
        f"{len(own)}: {told}; copy the dictionary that it was trained with to task.data, and write the labels with it"
    )


def start_decoder(decoder: nn.Module, cfg: Any, dictionary: Dictionary) -> None:
    """Gives the decoder the parameters of ``cfg.decoder_path``, of its layers those that ``cfg.decoder_init_layers`` names.

    Raises:
        FileNotFoundError, ValueError: the file has no decoder, another dictionary or another shape, or lacks a layer.
    """
    path = str(cfg.decoder_path)
    parsed, state, num_layers = read_decoder(path)
    check_dictionary(parsed, dictionary, path)
    _check_shape(cfg, parsed, path)
    layers: Tuple[int, ...] = tuple(range(num_layers))
    if cfg.decoder_init_layers:
        layers = parse_layer_choice(
            cfg.decoder_init_layers, num_layers, option="decoder_init_layers", may_be_none=False
        )
    if len(layers) != cfg.decoder_layers:
        raise ValueError(
            f"`model.decoder_layers` must be the number of layers taken from {path}, {len(layers)} ({_listed(layers)}), but is "
            f"{cfg.decoder_layers}; pass model.decoder_layers={len(layers)}, or choose others with model.decoder_init_layers"
        )
    decoder.load_state_dict(take_decoder_layers(state, layers))
    logger.info("the decoder starts from layers %s of %d of %s", _listed(layers), num_layers, path)


def take_decoder_layers(state: Mapping[str, Tensor], layers: Tuple[int, ...]) -> Dict[str, Tensor]:
    """The parameters of a decoder with these layers only, 0-based; embeddings and norms stay as they are."""
    taken = {name: value for name, value in state.items() if not name.startswith(_LAYERS)}
    for new, old in enumerate(layers):
        prefix = f"{_LAYERS}{old}."
        taken |= {f"{_LAYERS}{new}.{n.removeprefix(prefix)}": v for n, v in state.items() if n.startswith(prefix)}
    return taken


def _check_shape(cfg: Any, parsed: ParsedCheckpoint, path: str) -> None:
    theirs = {name: parsed.model_options.get(name, default) for name, default in _SHAPE.items()}
    wrong: List[str] = [name for name in _SHAPE if getattr(cfg, name) != theirs[name]]
    if wrong:
        came = ", ".join(f"{name} {getattr(cfg, name)}" for name in wrong)
        remedy = " ".join(f"model.{name}={str(theirs[name]).lower()}" for name in wrong)
        raise ValueError(
            f"a decoder that starts from model.decoder_path={path} must have its shape, but has {came}; pass {remedy}, or leave "
            "model.decoder_path out"
        )


def _listed(layers: Tuple[int, ...]) -> str:
    return ",".join(map(str, layers))
