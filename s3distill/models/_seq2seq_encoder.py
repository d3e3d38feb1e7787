"""The encoder of a model with a decoder: any that ``w2v_path`` names, behind fairseq's interface."""

# no `from __future__ import annotations`: used by files whose config fields fairseq reads
from dataclasses import fields
from typing import Any, Dict, Optional

import torch
import torch.nn.functional as F
from fairseq.models import FairseqEncoder
from torch import Tensor, nn

from s3distill.encoder.model import SpeechEncoder
from s3distill.encoder.training_config import MaskConfig, TrainingConfig
from s3distill.models._fine_tuning import _WITHOUT_EFFECT, read_backbone


class Seq2SeqEncoder(FairseqEncoder):
    """`SpeechEncoder` under stock `wav2vec_seq2seq`'s names (``w2v_model``, ``proj``), in the decoder's width.

    Args:
        cfg: options of `wav2vec_seq2seq_student`; what ``w2v_path`` holds goes into ``cfg.w2v_args``, so that checkpoints
            rebuild alone.
    Raises:
        FileNotFoundError, ValueError: see `read_backbone`; or an option of stock fairseq that has no effect here is set.
    """

    def __init__(self, cfg: Any) -> None:
        super().__init__(dictionary=None)
        if cfg.w2v_args is None:
            _check_without_effect(cfg)
        backbone = read_backbone(cfg)
        training = TrainingConfig(
            dropout=cfg.dropout,
            attention_dropout=cfg.attention_dropout,
            activation_dropout=cfg.activation_dropout,
            dropout_input=cfg.dropout_input,
            layerdrop=cfg.layerdrop,
            feature_grad_mult=cfg.feature_grad_mult,
            checkpoint_activations=cfg.checkpoint_activations,
        )
        names = {f.name for f in fields(MaskConfig)}
        masking = MaskConfig(**{name: getattr(cfg, name) for name in names if hasattr(cfg, name)})
        self.w2v_model = SpeechEncoder(backbone.config, training, masking)
        if backbone.encoder_state is not None:
            self.w2v_model.load_encoder_state(backbone.encoder_state, str(cfg.w2v_path))
        self.proj: Optional[nn.Linear] = None
        if backbone.config.output_dim != cfg.decoder_embed_dim:
            self.proj = nn.Linear(backbone.config.output_dim, cfg.decoder_embed_dim)
            nn.init.xavier_uniform_(self.proj.weight)
            nn.init.zeros_(self.proj.bias)
        self.apply_mask, self.final_dropout = cfg.apply_mask, cfg.final_dropout
        self.freeze_finetune_updates, self.num_updates = cfg.freeze_finetune_updates, 0

    def forward(self, source: Tensor, padding_mask: Optional[Tensor] = None, **_: Any) -> Dict[str, Any]:
        """Waveforms to what the decoder attends to.

        Args:
            source: [B, S], 16 kHz.
            padding_mask: [B, S], True = padding, or None.
        Returns:
            ``encoder_out`` [T, B, C], ``padding_mask`` [B, T] or None.
        """
        frozen = self.training and self.num_updates < self.freeze_finetune_updates
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            out = self.w2v_model(source, padding_mask, mask=self.apply_mask and self.training)
        x = F.dropout(out.x.transpose(0, 1), self.final_dropout, self.training)
        return {"encoder_out": x if self.proj is None else self.proj(x), "padding_mask": out.padding_mask}

    def reorder_encoder_out(self, encoder_out: Dict[str, Any], new_order: Tensor) -> Dict[str, Any]:
        """The utterances ``new_order`` [N], of which one may come several times: for a beam, or for several texts."""
        mask = encoder_out["padding_mask"]
        return {
            "encoder_out": encoder_out["encoder_out"].index_select(1, new_order),
            "padding_mask": None if mask is None else mask.index_select(0, new_order),
        }

    def set_num_updates(self, num_updates: int) -> None:
        super().set_num_updates(num_updates)
        self.num_updates = num_updates

    def max_positions(self) -> None:
        """Audio of any length."""


def _check_without_effect(cfg: Any) -> None:
    """Refuses options of stock `wav2vec_seq2seq` that this encoder has nothing for."""
    for name, default in _WITHOUT_EFFECT.items():
        value = getattr(cfg, name, default)
        if value is not None and value != default:
            raise ValueError(
                f"`model.{name}` has no effect on wav2vec_seq2seq_student and must stay {default}, but is {value!r}; leave it out"
            )
