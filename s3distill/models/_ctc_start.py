"""Where the weights of a `wav2vec_ctc_student` come from: a pre-trained encoder, or a fine-tuned CTC model with its head."""

from dataclasses import fields
from typing import Any, List, Optional, Sequence, Tuple

from s3distill import compat
from s3distill.encoder.checkpoint import ParsedCheckpoint, parse_checkpoint
from s3distill.encoder.symbols import match_symbols
from s3distill.masks.options import MaskOptions
from s3distill.masks.state import baked
from s3distill.models._backbone import Backbone, check_no_nested_gates, check_normalize, encoder_args, read_backbone
from s3distill.models._fine_tuning import check_without_effect, mask_options


def read_ctc_start(cfg: Any, symbols: Sequence[str]) -> Tuple[Backbone, Optional[ParsedCheckpoint]]:
    """What ``student_path`` or ``w2v_path`` holds, or, in a checkpoint, the shape alone; fills ``cfg.w2v_args``.

    Args:
        symbols: the dictionary, index = output.
    Returns:
        The encoder, with a head where it comes from ``student_path``, and that file's other contents.
    Raises:
        ValueError: neither or both are given, or the file has no CTC head for this dictionary.
    """
    if cfg.w2v_args is not None:
        return read_backbone(cfg), None
    check_without_effect(cfg)
    paths = [name for name in ("w2v_path", "student_path") if getattr(cfg, name)]
    if len(paths) != 1:
        came = "both are given" if paths else "neither is given"
        raise ValueError(
            f"`model.w2v_path` (a pre-trained encoder) or `model.student_path` (a fine-tuned CTC model, with its head) must say what the "
            f"student starts from, but {came}; pass one"
        )
    if cfg.w2v_path:
        return read_backbone(cfg), None
    path = str(cfg.student_path)
    if cfg.no_pretrained_weights:
        raise ValueError(
            "`model.no_pretrained_weights` is about model.w2v_path, but model.student_path is given; leave one of them out"
        )
    parsed = baked(parse_checkpoint(compat.load_checkpoint(path), path), path)
    check_normalize(parsed, bool(cfg.normalize), path)
    check_no_nested_gates(parsed, path)
    head = _head_for(parsed, symbols, path)
    cfg.w2v_args = encoder_args(parsed)
    return Backbone(parsed.config, parsed.encoder_state, head, path), parsed


def _head_for(parsed: ParsedCheckpoint, symbols: Sequence[str], path: str) -> Any:
    """The head of the file with its rows in the order of ``symbols``."""
    if parsed.head_state is None or parsed.pooled:
        raise ValueError(
            f"`model.student_path` must be a fine-tuned CTC model, but {path} has no CTC head; pass it as model.w2v_path, for a new head"
        )
    if parsed.symbols is None:
        raise ValueError(
            f"{path} carries no dictionary, so that nobody knows what its head's {len(parsed.head_state['weight'])} outputs mean; pass it "
            "as model.w2v_path, for a new head, or as checkpoint.finetune_from_model where the order of the data's dictionary is its own"
        )
    found = match_symbols(parsed.symbols, symbols, "exact", path)
    return {name: value[found.teacher] for name, value in parsed.head_state.items()}


def masks_of(cfg: Any) -> Optional[MaskOptions]:
    """The options of masks, or None where there are none.

    Raises:
        ValueError: ``masks`` is false, but an option of theirs is set.
    """
    options = mask_options(cfg)
    if cfg.masks:
        return options
    default = MaskOptions()
    changed = [f.name for f in fields(MaskOptions) if getattr(options, f.name) != getattr(default, f.name)]
    if changed:
        raise ValueError(
            f"`model.{changed[0]}` is about masks, but is {getattr(options, changed[0])!r} where model.masks=false; pass "
            "model.masks=true, or leave it out"
        )
    return None


def new_parts(cfg: Any) -> List[str]:
    """Options of a student that ask for something that only a distillation trains."""
    return [name for name in ("distill_layers", "prune_units") if getattr(cfg, name)]
