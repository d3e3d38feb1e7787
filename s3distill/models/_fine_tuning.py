"""What fine-tuned models share: the backbone that ``w2v_path`` names, and fairseq's interface around encoder and head."""

# no `from __future__ import annotations`: used by files whose config fields fairseq reads
from argparse import Namespace
from dataclasses import dataclass, fields
from typing import Any, Dict, Optional

from omegaconf import OmegaConf
from torch import Tensor

from s3distill import compat
from s3distill.encoder.checkpoint import config_from_options, parse_checkpoint
from s3distill.encoder.config import EncoderConfig, MaskConfig, TrainingConfig
from s3distill.masks.network import MaskedNetwork


@dataclass
class Backbone:
    """Shape of the encoder, and its weights where they come from ``w2v_path`` (None: a checkpoint follows)."""

    config: EncoderConfig
    encoder_state: Optional[Dict[str, Tensor]]


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
        family = next((f for f in ("ssl_student", "data2vec_audio", "hubert") if name.startswith(f)), "wav2vec2")
        return Backbone(config_from_options(options, family), None)
    parsed = parse_checkpoint(compat.load_checkpoint(cfg.w2v_path), cfg.w2v_path)
    if parsed.normalize != bool(cfg.normalize):
        raise ValueError(
            f"`task.normalize` must be what the backbone was trained with: {cfg.w2v_path} has normalize={parsed.normalize}, but the task "
            f"has {bool(cfg.normalize)}; pass task.normalize={str(parsed.normalize).lower()}"
        )
    if any("gates." in name for name in parsed.extra_state):
        raise ValueError(
            f"{cfg.w2v_path} has gates that were not pruned yet; cut them first: s3distill prune {cfg.w2v_path} compact.pt"
        )
    # the keys of a file that fairseq wrote: task and model of the pre-training
    cfg.w2v_args = {
        "task": {"_name": "audio_pretraining", "data": "", "normalize": parsed.normalize},
        "model": {**parsed.pretraining_options, "_name": parsed.family},
    }
    state = None if cfg.no_pretrained_weights else parsed.encoder_state
    return Backbone(parsed.config, state)


class FineTunedEncoder(MaskedNetwork):
    """`MaskedNetwork` built from fairseq's fine-tuning options, with fairseq's output.

    Args:
        num_outputs: symbols of the dictionary, or classes.
        extractor_learns: let gradients into the conv extractor even where ``feature_grad_mult`` is 0.
    """

    def __init__(
        self, cfg: Any, config: EncoderConfig, num_outputs: int, extractor_learns: bool = False, pool: bool = False
    ) -> None:
        training = TrainingConfig(
            dropout=cfg.dropout,
            attention_dropout=cfg.attention_dropout,
            activation_dropout=cfg.activation_dropout,
            dropout_input=cfg.dropout_input,
            layerdrop=cfg.layerdrop,
            feature_grad_mult=cfg.feature_grad_mult or float(extractor_learns),
            checkpoint_activations=cfg.checkpoint_activations,
        )
        names = {f.name for f in fields(MaskConfig)}
        masking = MaskConfig(**{name: getattr(cfg, name) for name in names if hasattr(cfg, name)})
        super().__init__(config, num_outputs, training, masking, pool, cfg.final_dropout)
        self.apply_mask = cfg.apply_mask
        self.freeze_finetune_updates, self.num_updates = cfg.freeze_finetune_updates, 0

    def run(self, source: Tensor, padding_mask: Optional[Tensor]) -> Dict[str, Any]:
        """[B, S] -> ``encoder_out`` [T, B, V] (with pooling [B, V]), ``padding_mask`` [B, T] or None, ``layer_results``."""
        frozen = self.training and self.num_updates < self.freeze_finetune_updates
        logits, out = self(source, padding_mask, mask=self.apply_mask and self.training, frozen_encoder=frozen)
        return {
            "encoder_out": logits if self.pool else logits.transpose(0, 1),
            "padding_mask": out.padding_mask,
            "layer_results": [(h.transpose(0, 1), None) for h in out.hidden_states[1:]],
        }

    def reorder_encoder_out(self, encoder_out: Dict[str, Any], new_order: Tensor) -> Dict[str, Any]:
        """fairseq's beam search reorders the batch."""
        reordered = dict(encoder_out)
        reordered["encoder_out"] = encoder_out["encoder_out"].index_select(0 if self.pool else 1, new_order)
        if encoder_out["padding_mask"] is not None:
            reordered["padding_mask"] = encoder_out["padding_mask"].index_select(0, new_order)
        return reordered
