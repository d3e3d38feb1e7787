"""The encoder that a fine-tuned model starts from: what ``w2v_path`` names, or what its own checkpoint describes."""

# no `from __future__ import annotations`: used by files whose config fields fairseq reads
from argparse import Namespace
from dataclasses import dataclass
from typing import Any, Dict, Optional

from omegaconf import OmegaConf
from torch import Tensor

from s3distill import compat
from s3distill.encoder.checkpoint import FAMILIES, ParsedCheckpoint, config_from_options, parse_checkpoint
from s3distill.encoder.config import EncoderConfig


@dataclass
class Backbone:
    """Shape of the encoder, and its weights where they come from a file (None: a checkpoint follows); the head's, if it brings one."""

    config: EncoderConfig
    encoder_state: Optional[Dict[str, Tensor]]
    head_state: Optional[Dict[str, Tensor]] = None
    path: str = "the checkpoint"


def read_backbone(cfg: Any) -> Backbone:
    """The encoder that ``cfg.w2v_path`` or, in a checkpoint, ``cfg.w2v_args`` describes; fills ``cfg.w2v_args``.

    Raises:
        FileNotFoundError, ValueError: the file is missing or no pre-trained encoder, or ``task.normalize`` is not its own.
    """
    if cfg.w2v_args is not None:
        nested = cfg.w2v_args
        if OmegaConf.is_config(nested):
            nested = OmegaConf.to_container(nested, resolve=True)
        if isinstance(nested, Namespace):
            nested = vars(nested)
        options = nested["model"] if isinstance(nested.get("model"), dict) else nested
        name = str(options.get("_name") or options.get("arch") or "wav2vec2")
        family = next((f for f in FAMILIES if name.startswith(f)), "wav2vec2")
        return Backbone(config_from_options(options, family), None)
    parsed = parse_checkpoint(compat.load_checkpoint(cfg.w2v_path), cfg.w2v_path)
    check_normalize(parsed, bool(cfg.normalize), cfg.w2v_path)
    if any("gates." in name for name in parsed.extra_state):
        raise ValueError(
            f"{cfg.w2v_path} has gates that were not pruned yet; cut them first: s3distill prune {cfg.w2v_path} compact.pt"
        )
    if parsed.scores:
        raise ValueError(
            f"{cfg.w2v_path} has masks beside its weights, which would be lost here; multiply them in first: s3distill masks bake "
            f"{cfg.w2v_path} dense.pt, or start from its masks with checkpoint.finetune_from_model"
        )
    cfg.w2v_args = encoder_args(parsed)
    state = None if cfg.no_pretrained_weights else parsed.encoder_state
    return Backbone(parsed.config, state, path=str(cfg.w2v_path))


def check_no_nested_gates(parsed: ParsedCheckpoint, path: str) -> None:
    """Refuses a model that was fine-tuned over a student with gates (`ValueError`): its encoder is not what it computes with."""
    if any("gates." in name and not name.startswith("gates.") for name in parsed.extra_state):
        raise ValueError(
            f"{path} was fine-tuned over gates that were not pruned yet, which would be lost here; start from a pruned encoder instead "
            "(s3distill prune, then fine-tune)"
        )


def check_normalize(parsed: ParsedCheckpoint, normalize: bool, path: str) -> None:
    """Refuses a task that normalises waveforms where the backbone's training did not, or the other way round (`ValueError`)."""
    if parsed.normalize != normalize:
        raise ValueError(
            f"`task.normalize` must be what the backbone was trained with: {path} has normalize={parsed.normalize}, but the task "
            f"has {normalize}; pass task.normalize={str(parsed.normalize).lower()}"
        )


def encoder_args(parsed: ParsedCheckpoint) -> Dict[str, Any]:
    """``w2v_args`` of a model over this encoder, under the keys of a file that fairseq wrote: task and model of the pre-training."""
    return {
        "task": {"_name": "audio_pretraining", "data": "", "normalize": parsed.normalize},
        "model": {**parsed.pretraining_options, "_name": parsed.family},
    }
