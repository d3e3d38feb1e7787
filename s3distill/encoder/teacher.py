"""The frozen teacher of a distillation: hidden states, and nothing that a student's checkpoint or optimizer sees."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from s3distill import kernels
from s3distill.encoder.checkpoint import ParsedCheckpoint
from s3distill.encoder.config import EncoderConfig
from s3distill.encoder.model import EncoderOutput, SpeechEncoder
from s3distill.encoder.speech_model import gates_of, normalize_waveforms
from s3distill.gates.values import GateValues

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Teacher:
    """A frozen encoder in eval mode, run under `inference_mode` and in a precision of its own, only as deep as asked.

    It is no `nn.Module` on purpose: a task or criterion that holds it adds nothing to checkpoints, DDP or the optimizer. Gates
    that were not pruned yet act as in evaluation.

    Attributes:
        config: shape of the whole teacher, also when only its lower layers are kept.
        normalize: whether its waveforms are normalised.
        normalizes_itself: whether `hidden_states` takes waveforms as they were read and normalises them over their valid
            samples; else they come as the teacher was trained on them.
    """

    normalizes_itself = False

    def __init__(self, checkpoint: ParsedCheckpoint, dtype: str = "float32", name: str = "the teacher") -> None:
        if dtype not in DTYPES:
            raise ValueError(f"`teacher_dtype` must be one of {', '.join(DTYPES)}, but is {dtype!r}")
        self.config: EncoderConfig = checkpoint.config
        self.normalize = checkpoint.normalize
        self.name = name
        self.dtype = DTYPES[dtype]
        self._encoder = SpeechEncoder(checkpoint.config)
        self._encoder.load_encoder_state(checkpoint.encoder_state, name)
        self._encoder.eval().requires_grad_(False).to(self.dtype)
        self._encoder.freeze()
        self._gates = gates_of(checkpoint)

    def check_layers(self, layers: Sequence[int]) -> None:
        """Raises `ValueError` for layers that the teacher lacks."""
        lacking = [layer for layer in layers if not 0 <= layer <= self.config.num_layers]
        if lacking:
            raise ValueError(
                f"layers to match must be within 0 to {self.config.num_layers}, the layers of {self.name}, but include {lacking}; "
                "correct model.distill_layers"
            )

    def has_extractor_of(self, other: SpeechEncoder) -> bool:
        """Whether the convolutions of ``other`` are this teacher's, weight by weight in the teacher's precision, without gates."""
        if self._gates is not None and "conv" in self._gates.units:
            return False
        names = ("conv_layers", "extractor_mode", "conv_bias", "group_norm_over_padding")
        if any(getattr(self.config, name) != getattr(other.config, name) for name in names):
            return False
        own, its = self._encoder.feature_extractor.state_dict(), other.feature_extractor.state_dict()
        return all(torch.equal(own[name].cpu(), its[name].detach().cpu().to(self.dtype)) for name in own)

    def hidden_states(
        self,
        source: Tensor,
        padding_mask: Tensor | None,
        layers: Sequence[int],
        masked: Tensor | None = None,
        conv_features: Tensor | None = None,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Hidden states of ``layers``, as deep as the deepest of them.

        Args:
            source: [B, S], 16 kHz.
            padding_mask: [B, S], True = padding, or None.
            masked: [B, T], True = the frame is replaced by the teacher's own mask embedding; None: it hears everything.
            conv_features: [B, T, C_conv], what a student that `has_extractor_of` gave for this batch; None: its own.
        Returns:
            per layer [B, T, C] float32, and the frame padding mask [B, T] or None.
        """
        self.check_layers(layers)
        out = self._run(source, padding_mask, max(layers), masked, conv_features)
        # cloned outside of inference mode: losses save their targets for the backward pass
        states = [out.hidden_states[layer].clone().float() for layer in layers]
        return states, None if out.padding_mask is None else out.padding_mask.clone()

    def _run(
        self,
        source: Tensor,
        padding_mask: Tensor | None,
        num_layers: int | None,
        masked: Tensor | None,
        conv_features: Tensor | None,
    ) -> EncoderOutput:
        if next(self._encoder.parameters()).device != source.device:
            self._encoder.to(source.device)
        if self.normalizes_itself:
            source = normalize_waveforms(source.float(), padding_mask)
        # autocast is the student's affair: this one has a precision of its own
        with torch.inference_mode(), kernels.without_autocast(source.device):
            out: EncoderOutput = self._encoder(
                source.to(self.dtype),
                padding_mask,
                gates=self._gate_values(source.device),
                num_layers=num_layers,
                masked=masked,
                conv_features=conv_features,
            )
        return out

    def _gate_values(self, device: torch.device) -> GateValues | None:
        return None if self._gates is None else self._gates.to(device).deterministic()
