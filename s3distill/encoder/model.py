"""The speech encoder: waveforms at 16 kHz to hidden states at 50 Hz, for teacher and student alike."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from s3distill import products
from s3distill.encoder.attention import bert_linear
from s3distill.encoder.config import EncoderConfig
from s3distill.encoder.conv import ConvExtractor
from s3distill.encoder.dropout import dropout
from s3distill.encoder.layers import LayerNorm, gated_norm, scale_gradient
from s3distill.encoder.masking import draw_frame_mask, mask_channels, mask_frames, replace_frames
from s3distill.encoder.positional import WeightNormConv
from s3distill.encoder.training_config import MaskConfig, TrainingConfig
from s3distill.encoder.transformer import Transformer
from s3distill.gates.values import GateValues
from s3distill.heads.kept_heads import KeptHeads

# what the names of an encoder's parameters start with; everything else in a checkpoint belongs to heads and training
PARAMETER_PREFIXES = (
    "feature_extractor.",
    "layer_norm.",
    "post_extract_proj.",
    "mask_emb",
    "encoder.",
    "output_heads.",
)


@dataclass
class EncoderOutput:
    """What one pass of the encoder gives; T frames, of which a `time_reduction` r leaves T // r of the extractor's T_features.

    Attributes:
        x: the encoder's output, [B, T, C]; for pre-LN models behind the final LayerNorm. Where prediction heads were kept,
            theirs.
        hidden_states: L+1 tensors [B, T, C]; 0 = what enters the first layer, i = output of layer i.
        ffn_outputs: per layer the FFN's output before the residual, [B, T, C] (data2vec's targets).
        features: conv features behind their LayerNorm, [B, T_features, C_conv].
        padding_mask: [B, T], True = padding; None when nothing is padded.
        masked: [B, T_features], True = replaced by the mask embedding; None without time masks.
    """

    x: Tensor
    hidden_states: list[Tensor]
    ffn_outputs: list[Tensor]
    features: Tensor
    padding_mask: Tensor | None
    masked: Tensor | None


class SpeechEncoder(nn.Module):
    """wav2vec 2.0 / HuBERT / data2vec-audio / WavLM's encoder, with the checkpoints' own parameter names.

    Args:
        config: the shape.
        training: dropouts and the like; evaluation never looks at it.
        masking: SpecAugment masks, used when ``forward(mask=True)``.
    """

    def __init__(
        self, config: EncoderConfig, training: TrainingConfig | None = None, masking: MaskConfig | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.training_config = training or TrainingConfig()
        self.masking = masking or MaskConfig()
        conv_channels = config.conv_layers[-1].channels
        self.feature_extractor = ConvExtractor(config)
        self.layer_norm = LayerNorm(conv_channels)
        self.post_extract_proj = bert_linear(conv_channels, config.embed_dim) if config.project_features else None
        self.mask_emb = nn.Parameter(torch.empty(config.embed_dim).uniform_())
        self.encoder = Transformer(config, self.training_config)
        self.output_heads = None if config.output is None else KeptHeads(config.output)

    def forward(
        self,
        source: Tensor,
        padding_mask: Tensor | None = None,
        mask: bool = False,
        gates: GateValues | None = None,
        num_layers: int | None = None,
        masked: Tensor | None = None,
        conv_features: Tensor | None = None,
    ) -> EncoderOutput:
        """Encodes a batch.

        Args:
            source: waveforms, [B, S], 16 kHz, normalised if the model was trained so.
            padding_mask: [B, S], True = padding (at the end of a row), or None.
            mask: apply time and channel masks.
            gates: values of the L0 gates, or None.
            num_layers: run only that many Transformer layers; None runs all.
            masked: [B, T_features], True = this frame is replaced by the mask embedding, as `draw_masks` gives it; instead of
                ``mask``.
            conv_features: what `extract` of an encoder with the same extractor gave for this batch, [B, T_features, C_conv]; the
                convolutions are not run again.
        Raises:
            ValueError: a waveform is shorter than one frame, or longer than the encoder's attention can take.
        """
        lengths = _valid_lengths(source, padding_mask)
        self._check_lengths(source, lengths)
        width_gate = gates.width if gates is not None else None
        conv_gates = gates.conv if gates is not None else None
        if conv_gates is not None and width_gate is not None and self.post_extract_proj is None:
            conv_gates = (*conv_gates[:-1], width_gate)  # the last conv layer's channels are the stream's
        if conv_features is None:
            features = self.layer_norm(*self._extract(source, lengths, conv_gates))
        else:
            assert conv_gates is None or not any(gate is not None for gate in conv_gates), "gated convolutions differ"
            features = self.layer_norm(conv_features.to(self.layer_norm.weight.dtype))
        if conv_gates is not None and conv_gates[-1] is not None:
            features = features * conv_gates[-1].to(features.dtype)
        frame_mask = None
        if lengths is not None:
            num_frames = self.config.num_feature_frames(lengths)
            frame_mask = torch.arange(features.shape[1], device=source.device) >= num_frames[:, None]

        x = features if self.post_extract_proj is None else self.post_extract_proj(features)
        mask_emb: Tensor = self.mask_emb
        if width_gate is not None:
            mask_emb = mask_emb * width_gate.to(mask_emb.dtype)
            x = x if self.post_extract_proj is None else x * width_gate.to(x.dtype)
        x = dropout(x, self.training_config.dropout_input, self.training)
        if masked is not None:
            x = replace_frames(x, mask_emb, masked)
        elif mask:
            if self.masking.mask_channel_before:
                x = mask_channels(x, self.masking)
            x, masked = mask_frames(x, mask_emb, frame_mask, self.masking)
            if not self.masking.mask_channel_before:
                x = mask_channels(x, self.masking)
        hidden_states, ffn_outputs = self.encoder(x, frame_mask, gates, num_layers)
        x = hidden_states[-1]
        if num_layers is None or num_layers >= self.config.num_layers:
            if self.output_heads is not None:
                x = self.output_heads(hidden_states)
            elif self.config.layer_norm_first:
                x = gated_norm(self.encoder.layer_norm, x, width_gate)
        padding_mask = self.encoder.reduce_mask(frame_mask)
        return EncoderOutput(x, hidden_states, ffn_outputs, features, padding_mask, masked)

    def freeze(self) -> None:
        """Prepares the encoder for running without ever learning: weights as they are read fastest, no longer in the state dict."""
        products.freeze_linears(self)
        for module in self.modules():
            if isinstance(module, WeightNormConv):
                module.freeze()

    def extract(self, source: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """What the convolutions give, in front of the LayerNorm, for ``forward(conv_features=...)``.

        Args:
            source: [B, S], 16 kHz.
            padding_mask: [B, S], True = padding, or None.
        Returns:
            [B, T, C_conv]
        Raises:
            ValueError: a waveform is shorter than one frame.
        """
        lengths = _valid_lengths(source, padding_mask)
        self._check_lengths(source, lengths)
        return self._extract(source, lengths, None)[0]

    def draw_masks(self, source: Tensor, padding_mask: Tensor | None, seeds: Sequence[Sequence[int]]) -> Tensor:
        """Time masks for ``forward(masked=...)`` of this encoder, or of several that cut audio into the same frames.

        Args:
            source: [B, S], of which only the length counts.
            padding_mask: [B, S], True = padding, or None.
            seeds: what decides the mask of each row, besides its number of frames and `masking`.
        Returns:
            [B, T_features] bool, True = masked; never a padded frame.
        Raises:
            ValueError: a waveform is shorter than one frame.
        """
        lengths = _valid_lengths(source, padding_mask)
        self._check_lengths(source, lengths)
        width = int(self.config.num_feature_frames(source.shape[1]))
        sizes = [width] * len(source) if lengths is None else self.config.num_feature_frames(lengths).tolist()
        rngs = [np.random.default_rng(list(seed)) for seed in seeds]
        return draw_frame_mask(sizes, width, self.masking, rngs).to(source.device)

    def _extract(
        self, source: Tensor, lengths: Tensor | None, gates: tuple[Tensor | None, ...] | None
    ) -> tuple[Tensor, Tensor | None]:
        """Conv features [B, T, C_conv] with their gradient scaled, and the gate of their last layer."""
        scale = self.training_config.feature_grad_mult
        with torch.no_grad() if scale <= 0 else contextlib.nullcontext():
            features = self.feature_extractor(source, lengths, gates)
        if scale > 0:
            features = scale_gradient(features, scale)
        return features.transpose(1, 2), gates[-1] if gates is not None else None

    def _check_lengths(self, source: Tensor, lengths: Tensor | None) -> None:
        needed = self.config.receptive_field
        shortest = source.shape[1] if lengths is None else int(lengths.min())
        if shortest < needed:
            raise ValueError(
                f"every waveform must have at least {needed} samples ({needed / 16:.0f} ms at 16 kHz), so that it gives "
                f"one frame, but the shortest has {shortest}; drop such utterances (min_sample_size) or pad the audio"
            )
        if self.config.attention == "linformer":
            self._check_longest(self.config.num_frames(source.shape[1]))

    def _check_longest(self, num_frames: int) -> None:
        allowed = self.config.linformer_max_frames
        if num_frames > allowed:
            raise ValueError(
                f"with Linformer's attention a waveform must have at most `linformer_max_frames` = {allowed} frames "
                f"({allowed * self.config.frame_stride / 16_000:.1f} s), but the longest has {num_frames}; crop or drop such utterances "
                "(task.max_sample_size), or train a student with a larger model.linformer_max_frames"
            )

    def load_encoder_state(self, state: dict[str, Tensor], source: str = "the checkpoint") -> None:
        """Loads parameters by name; all must be there, fit and be finite.

        Raises:
            ValueError: names are missing, shapes differ or values are NaN or infinite; the message lists them.
        """
        own = {name: p for name, p in self.state_dict().items() if name in dict(SpeechEncoder.named_parameters(self))}
        own = {name: p for name, p in own.items() if not name.startswith(("heads.", "gates.", "lagrangian."))}
        missing = sorted(set(own) - set(state))
        unexpected = sorted(n for n in state if n not in own and n.startswith(PARAMETER_PREFIXES))
        if unexpected:
            raise ValueError(
                f"{source} has encoder parameters that this encoder has not, {unexpected[:5]} ({len(unexpected)} in all): it is of "
                "another architecture, and leaving them out would compute something else"
            )
        wrong = [
            f"{name}: {tuple(state[name].shape)} instead of {tuple(p.shape)}"
            for name, p in own.items()
            if name in state and state[name].shape != p.shape
        ]
        if missing or wrong:
            raise ValueError(
                f"{source} does not fit the encoder's shape; missing: {missing[:5] or 'none'}, of another shape: "
                f"{wrong[:5] or 'none'} ({len(missing)} and {len(wrong)} in all); was it saved completely, by the model it names?"
            )
        broken = [name for name in own if not bool(state[name].isfinite().all())]
        if broken:
            raise ValueError(
                f"the weights in {source} must be finite, but {', '.join(broken[:5])} ({len(broken)} in all) hold NaN or infinity: the "
                "training that wrote it diverged; take an earlier checkpoint"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])


def _valid_lengths(source: Tensor, padding_mask: Tensor | None) -> Tensor | None:
    """Valid samples per row, [B], or None when no sample is padding."""
    if padding_mask is None or not bool(padding_mask.any()):
        return None
    if padding_mask.shape != source.shape:
        raise ValueError(
            f"`padding_mask` must have the shape of `source`, {tuple(source.shape)}, but has {tuple(padding_mask.shape)}"
        )
    return (~padding_mask).sum(-1)
