"""Where the weights of an `ssl_student` come from: a whole checkpoint, some of its layers, or its extractor alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from s3distill import compat
from s3distill.encoder.checkpoint import ParsedCheckpoint, config_from_options, parse_checkpoint
from s3distill.encoder.config import EncoderConfig, parse_conv_layers
from s3distill.encoder.layer_choice import NO_LAYERS, parse_layer_choice, take_extractor, take_layers
from s3distill.encoder.options import VARIANT_OPTIONS, variant_options
from s3distill.masks.state import baked
from s3distill.models._backbone import check_no_nested_gates

logger = logging.getLogger(__name__)


def read_start(cfg: Any, defaults: Mapping[str, Any]) -> ParsedCheckpoint:
    """What ``student_path`` holds, or the part of it that ``init_layers`` names.

    Args:
        cfg: options of `ssl_student`, and
        defaults: the same where nothing is given, to tell which options say something.
    Raises:
        ValueError: layers are lacking, or other options of the shape contradict the file.
    """
    path = str(cfg.student_path)
    _check_variants(cfg, path)
    start = _read(path, bool(cfg.normalize))
    if not cfg.init_layers:
        if start.model_name == "ssl_student":
            return start  # an earlier stage of this student: the options are of the shape before it was cut
        _check_not_both(cfg, defaults, start.config, _LAYER_OPTIONS, path)
        return start
    start.extra_state = {name: v for name, v in start.extra_state.items() if not name.startswith("heads.")}
    if cfg.init_layers == NO_LAYERS:
        rest = config_from_options(cfg, "ssl_student")
        _check_not_both(cfg, defaults, start.config, _EXTRACTOR_OPTIONS, path)
        start.config, start.encoder_state = take_extractor(start.config, start.encoder_state, rest)
        return start
    layers = parse_layer_choice(cfg.init_layers, start.config.num_layers)
    start.config, start.encoder_state = take_layers(start.config, start.encoder_state, layers)
    _check_not_both(cfg, defaults, start.config, _LAYER_OPTIONS, path)
    logger.info("layers 0 to %d of the student start from layers %s of %s", len(layers) - 1, list(layers), path)
    return start


def _check_variants(cfg: Any, path: str) -> None:
    """A student that starts from a file has the file's shape: what would change it is refused."""
    set_here = [name for name, value in variant_options(cfg).items() if value != VARIANT_OPTIONS[name]]
    if cfg.init_layers == NO_LAYERS:
        set_here = [name for name in set_here if name == "separable_conv_layers"]  # the rest is free
    if set_here:
        raise ValueError(
            f"`model.{set_here[0]}` shapes students from scratch, but model.student_path={path} brings its own shape; leave "
            f"{', '.join(f'model.{name}' for name in set_here)} or model.student_path out"
        )


# option -> what it is in the file that a student copies from
_EXTRACTOR_OPTIONS: dict[str, Callable[[EncoderConfig], Any]] = {
    "extractor_mode": lambda c: c.extractor_mode,
    "conv_feature_layers": lambda c: c.conv_layers,
    "conv_bias": lambda c: c.conv_bias,
}
_LAYER_OPTIONS: dict[str, Callable[[EncoderConfig], Any]] = {
    **_EXTRACTOR_OPTIONS,
    "encoder_layers": lambda c: c.num_layers,
    "encoder_embed_dim": lambda c: c.embed_dim,
    "encoder_ffn_embed_dim": lambda c: max((layer.ffn_dim for layer in c.layers), default=0),
    "encoder_attention_heads": lambda c: max((layer.num_heads for layer in c.layers), default=0),
    "layer_norm_first": lambda c: c.layer_norm_first,
    "activation_fn": lambda c: c.activation,
    "conv_pos": lambda c: c.pos_conv_kernel,
    "conv_pos_groups": lambda c: c.pos_conv_groups,
    "pos_conv_depth": lambda c: c.pos_conv_depth,
    "relative_position_embedding": lambda c: c.position_buckets > 0,
}


def _check_not_both(
    cfg: Any,
    defaults: Mapping[str, Any],
    taken: EncoderConfig,
    options: Mapping[str, Callable[[EncoderConfig], Any]],
    path: str,
) -> None:
    """An option of the shape that the file decides must be the file's, or be left at its default, which says nothing."""
    for name, value in options.items():
        asked, default = (_read_option(name, given) for given in (getattr(cfg, name), defaults[name]))
        if asked not in (default, value(taken)):
            raise ValueError(
                f"`model.{name}` is {getattr(cfg, name)}, but model.init_layers={cfg.init_layers!r} takes the shape of {path}, where it is "
                f"{_shown(value(taken))}; leave it out, or give the student random weights (model.init_layers={NO_LAYERS}, or "
                "model.student_path=null)"
            )


def _read_option(name: str, value: Any) -> Any:
    return parse_conv_layers(value) if name == "conv_feature_layers" else getattr(value, "value", value)


def _shown(value: Any) -> Any:
    return [(c.channels, c.kernel, c.stride) for c in value] if isinstance(value, tuple) else value


def _read(path: str, normalize: bool) -> ParsedCheckpoint:
    parsed = baked(parse_checkpoint(compat.load_checkpoint(path), path), path)
    check_no_nested_gates(parsed, path)
    if parsed.normalize != normalize:
        raise ValueError(
            f"`task.normalize` must be what the checkpoint was trained with: {path} has normalize={parsed.normalize}, but the task "
            f"has {normalize}; pass task.normalize={str(parsed.normalize).lower()}"
        )
    return parsed
