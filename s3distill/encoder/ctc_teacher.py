"""A teacher that was fine-tuned with CTC: hidden states and logits of one forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from s3distill import kernels
from s3distill.encoder.checkpoint import ParsedCheckpoint
from s3distill.encoder.teacher import Teacher


class TeacherOutput(NamedTuple):
    """What a teacher says about a batch, all float32 and usable in a backward pass.

    Attributes:
        hidden_states: per asked layer [B, T, C].
        logits: [B, T, V] in the order of the teacher's dictionary, or None where none were asked for.
        padding_mask: [B, T], True = padding, or None.
    """

    hidden_states: list[Tensor]
    logits: Tensor | None
    padding_mask: Tensor | None


class CtcTeacher(Teacher):
    """`Teacher` with the CTC head of its checkpoint; one that was only pre-trained has none, and gives hidden states.

    ``blank_weight`` of the checkpoint, which moves what it decodes, is part of its logits.

    Attributes:
        symbols: dictionary of the head (index = output), or None: no head, or a file without its dictionary.
    """

    def __init__(self, checkpoint: ParsedCheckpoint, dtype: str = "float32", name: str = "the teacher") -> None:
        super().__init__(checkpoint, dtype, name)
        self.symbols = checkpoint.symbols
        self._head: tuple[Tensor, Tensor] | None = None
        if checkpoint.head_state is not None and not checkpoint.pooled:
            self._head = checkpoint.head_state["weight"].to(self.dtype), checkpoint.head_state["bias"].to(self.dtype)
        options = checkpoint.model_options
        self._blank = float(options.get("blank_weight") or 0), str(options.get("blank_mode") or "add")

    @property
    def num_outputs(self) -> int:
        """Outputs of the head; 0 without one."""
        return 0 if self._head is None else len(self._head[0])

    def check_head(self) -> None:
        """Raises `ValueError` where there is no CTC head."""
        if self._head is None:
            raise ValueError(
                f"distilling logits needs a teacher with a CTC head, but {self.name} has none: it was only pre-trained, or classifies "
                "whole utterances; pass a fine-tuned checkpoint as task.teacher_path, or criterion.alpha=1 for its hidden states alone"
            )

    def outputs(
        self,
        source: Tensor,
        padding_mask: Tensor | None,
        layers: Sequence[int],
        with_logits: bool,
        masked: Tensor | None = None,
        conv_features: Tensor | None = None,
    ) -> TeacherOutput:
        """One forward, as deep as what is asked for: to the last layer for logits, else to the deepest of ``layers``.

        Args:
            source: [B, S], 16 kHz.
            padding_mask: [B, S], True = padding, or None.
            layers: whose hidden states, 0 = what enters the first layer.
            masked, conv_features: see `Teacher.hidden_states`.
        """
        self.check_layers(layers)
        if with_logits:
            self.check_head()
        deepest = None if with_logits else max(layers, default=0)
        out = self._run(source, padding_mask, deepest, masked, conv_features)
        logits = self._logits(out.x).clone() if with_logits else None
        states = [out.hidden_states[layer].clone().float() for layer in layers]
        return TeacherOutput(states, logits, None if out.padding_mask is None else out.padding_mask.clone())

    def _logits(self, x: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, V] float32"""
        assert self._head is not None
        weight, bias = self._head = self._head[0].to(x.device), self._head[1].to(x.device)
        with torch.inference_mode(), kernels.without_autocast(x.device):
            logits = F.linear(x, weight, bias).float()
            shift, mode = self._blank
            if shift != 0:
                logits[..., 0] = shift if mode == "set" else logits[..., 0] + shift
        return logits
