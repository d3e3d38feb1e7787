"""`s3distill.load`'s model: any supported checkpoint as one callable, waveforms to hidden states and logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s3distill.encoder.attention import bert_linear
from s3distill.encoder.checkpoint import ParsedCheckpoint
from s3distill.encoder.model import SpeechEncoder
from s3distill.gates.gate_set import GateSet
from s3distill.masks.network import mean_over_frames
from s3distill.masks.state import baked


@dataclass
class SpeechOutput:
    """Result of `SpeechModel`.

    Attributes:
        hidden_states: L+1 tensors [B, T, C]; 0 = what enters the first layer, i = output of layer i.
        padding_mask: [B, T], True = padding, or None when nothing is padded.
        x: the encoder's output, [B, T, C] (behind the final LayerNorm of pre-LN models).
        logits: [B, T, V] where the checkpoint has a CTC head, [B, V] where it classifies utterances, else None.
    """

    hidden_states: list[Tensor]
    padding_mask: Tensor | None
    x: Tensor
    logits: Tensor | None


class SpeechModel(nn.Module):
    """An encoder with its waveform normalisation and, where there is one, its head.

    Masks of S3-Router are multiplied into the weights: a masked model costs what its dense one does.

    Attributes:
        encoder: the `SpeechEncoder`.
        head: Linear [C -> V], or None.
        pooled: whether the head classifies utterances, and not frames (CTC).
        symbols: dictionary or classes of the head (index = position), or None.
        gates: L0 gates of a student that was not pruned yet, or None; they act as in its own evaluation mode.
        normalize: whether waveforms are normalised per utterance, as the model was trained.
    """

    pooled: bool = False

    def __init__(self, checkpoint: ParsedCheckpoint, name: str = "the checkpoint") -> None:
        super().__init__()
        checkpoint = baked(checkpoint, name)
        self.encoder = SpeechEncoder(checkpoint.config)
        self.encoder.load_encoder_state(checkpoint.encoder_state, name)
        self.head: nn.Linear | None = None
        if checkpoint.head_state is not None:
            num_symbols, width = checkpoint.head_state["weight"].shape
            self.head = bert_linear(width, num_symbols)
            self.head.load_state_dict(checkpoint.head_state)
        self.pooled = checkpoint.pooled
        self.gates = gates_of(checkpoint)
        self.symbols = checkpoint.symbols
        self.normalize = checkpoint.normalize
        self.family = checkpoint.family
        self.eval()

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> SpeechOutput:
        """Runs the model.

        Args:
            waveforms: [B, S] float32, 16 kHz mono, as read from the file (normalisation is done here).
            lengths: valid samples per row, [B] integers, or None when nothing is padded.
        Raises:
            ValueError: wrong shapes, or a waveform shorter than one frame.
        """
        if waveforms.dim() != 2:
            raise ValueError(
                f"`waveforms` must be [B, S], but has shape {tuple(waveforms.shape)}; use waveform[None] for one"
            )
        padding_mask = None
        if lengths is not None:
            lengths = torch.as_tensor(lengths, device=waveforms.device)
            if (
                lengths.shape != waveforms.shape[:1]
                or int(lengths.max()) > waveforms.shape[1]
                or int(lengths.min()) < 1
            ):
                raise ValueError(
                    f"`lengths` must be [B] = [{waveforms.shape[0]}] integers from 1 to S = {waveforms.shape[1]}, but is "
                    f"{lengths.tolist()}"
                )
            padding_mask = torch.arange(waveforms.shape[1], device=waveforms.device) >= lengths[:, None]
        if self.normalize:
            waveforms = normalize_waveforms(waveforms, padding_mask)
        elif padding_mask is not None:
            waveforms = waveforms.masked_fill(padding_mask, 0)
        out = self.encoder(waveforms, padding_mask, gates=None if self.gates is None else self.gates.deterministic())
        logits = None
        if self.head is not None:
            logits = self.head(mean_over_frames(out.x, out.padding_mask) if self.pooled else out.x)
        return SpeechOutput(out.hidden_states, out.padding_mask, out.x, logits)


def gates_of(checkpoint: ParsedCheckpoint) -> GateSet | None:
    """The gates of a student that was not pruned yet, or None."""
    state = {k.partition("gates.")[2]: v for k, v in checkpoint.extra_state.items() if "gates." in k}
    if not state:
        return None
    gates = GateSet(checkpoint.config, list(checkpoint.student_options.get("prune_units") or []))
    gates.load_state_dict(state)
    return gates


def normalize_waveforms(waveforms: Tensor, padding_mask: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Zero mean and unit variance per utterance over its valid samples, [B, S]; padding becomes 0 (fairseq's ``task.normalize``)."""
    if padding_mask is None:
        return F.layer_norm(waveforms, waveforms.shape[1:], eps=eps)
    valid = ~padding_mask
    num_valid = valid.sum(-1, keepdim=True)
    mean = (waveforms * valid).sum(-1, keepdim=True) / num_valid
    centred = (waveforms - mean) * valid
    variance = centred.square().sum(-1, keepdim=True) / num_valid
    return centred * torch.rsqrt(variance + eps)
