"""`ssl_student`: a speech encoder that is distilled, gated and pruned, and fine-tunes like any pre-trained fairseq model."""

# no `from __future__ import annotations`: fairseq reads the types of config fields
from dataclasses import dataclass, field, fields, replace
from typing import Any, List, Optional

from fairseq.dataclass import ChoiceEnum
from fairseq.models import BaseFairseqModel, register_model
from omegaconf import II
from torch import Tensor

from s3distill.encoder.checkpoint import ParsedCheckpoint, config_from_options
from s3distill.encoder.config import ACTIVATIONS, EXTRACTOR_MODES, EncoderConfig
from s3distill.encoder.layer_choice import NO_LAYERS
from s3distill.encoder.model import PARAMETER_PREFIXES, SpeechEncoder
from s3distill.encoder.training_config import MaskConfig, TrainingConfig
from s3distill.encoder.variants import ATTENTIONS, SHARED
from s3distill.models._gate_options import GateOptions
from s3distill.models._head_options import HeadOptions
from s3distill.models._student_parts import StudentParts, fill_options
from s3distill.models._student_start import read_start

MASK_SELECTIONS = ChoiceEnum(["static", "uniform", "normal", "poisson"])


@dataclass
class SslStudentConfig(HeadOptions, GateOptions):
    """Options of `ssl_student`; those that wav2vec 2.0 has too carry its names."""

    student_path: Optional[str] = field(
        default=None,
        metadata={
            "help": "checkpoint or Hugging Face folder that the student starts from (the teacher's, or a compact one): shape and weights; "
            "heads come along where they fit. None: random weights in the shape of the options below"
        },
    )
    init_layers: str = field(
        default="",
        metadata={
            "help": "Transformer layers that are copied from `student_path`, 0-based: 'first:2', 'every:4' (0, 4, 8, ...) or '0,4,8', with "
            "extractor, projection and positional convolution; 'none': the extractor alone, the rest random in the shape of the options "
            "below; empty: all of it"
        },
    )
    encoder: Optional[str] = field(
        default=None,
        metadata={"help": "shape as JSON; filled in when training starts, so that checkpoints rebuild alone"},
    )
    # shape from scratch, as in fairseq's wav2vec2
    extractor_mode: ChoiceEnum(list(EXTRACTOR_MODES)) = field(  # type: ignore[valid-type]
        default="default",
        metadata={"help": "default: GroupNorm behind the first conv; layer_norm: LayerNorm behind every conv"},
    )
    conv_feature_layers: str = field(
        default="[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2",
        metadata={"help": "waveform extractor: list of (channels, kernel, stride)"},
    )
    conv_bias: bool = field(default=False, metadata={"help": "bias in the extractor's convolutions"})
    encoder_layers: int = field(default=12, metadata={"help": "Transformer layers"})
    encoder_embed_dim: int = field(default=768, metadata={"help": "width of the Transformer"})
    encoder_ffn_embed_dim: int = field(default=3072, metadata={"help": "inner width of the FFN"})
    encoder_attention_heads: int = field(default=12, metadata={"help": "attention heads"})
    activation_fn: ChoiceEnum(list(ACTIVATIONS)) = field(default="gelu", metadata={"help": "activation of the FFN"})  # type: ignore[valid-type]
    layer_norm_first: bool = field(default=False, metadata={"help": "pre-LN (True) or post-LN (False) layers"})
    conv_pos: int = field(default=128, metadata={"help": "kernel of the positional convolution, frames"})
    conv_pos_groups: int = field(default=16, metadata={"help": "groups of the positional convolution"})
    pos_conv_depth: int = field(default=1, metadata={"help": "positional convolutions in a stack; > 1 is data2vec's"})
    relative_position_embedding: bool = field(
        default=False, metadata={"help": "WavLM's gated relative position bias, one for all layers"}
    )
    num_buckets: int = field(default=320, metadata={"help": "of that bias: distances that it tells apart"})
    max_distance: int = field(
        default=800, metadata={"help": "of that bias: frames from which all distances count as one"}
    )
    group_norm_over_padding: bool = field(
        default=False, metadata={"help": "take GroupNorm statistics over padding too, as fairseq does"}
    )
    # variants, of students from scratch
    separable_conv_layers: List[int] = field(
        default_factory=list,
        metadata={
            "help": "conv layers that are depthwise-separable, counted from 0; layer 0 has one input and cannot be: [1,2,3,4,5,6]"
        },
    )
    time_reduction: int = field(
        default=1, metadata={"help": "frames that a convolution in front of layer 0 makes one of (FitHuBERT: 2)"}
    )
    shared: ChoiceEnum(list(SHARED)) = field(  # type: ignore[valid-type]
        default="none",
        metadata={
            "help": "parameters that layers have in common (ALBERT); attention and ffn leave the LayerNorms apart"
        },
    )
    shared_group: int = field(
        default=0, metadata={"help": "consecutive layers that share parameters; 0: all layers are one group"}
    )
    attention: ChoiceEnum(list(ATTENTIONS)) = field(  # type: ignore[valid-type]
        default="full",
        metadata={
            "help": "full: all pairs of frames; windowed: near ones (Longformer); linformer: projected keys, values"
        },
    )
    attention_window: int = field(default=0, metadata={"help": "of windowed: frames on each side that are attended to"})
    attention_global: int = field(
        default=0, metadata={"help": "of windowed: so many first frames attend to all, and all to them"}
    )
    linformer_dim: int = field(default=0, metadata={"help": "of linformer: frames that keys and values become"})
    linformer_max_frames: int = field(
        default=0, metadata={"help": "of linformer: frames of the longest utterance; longer ones are refused"}
    )
    reuse_attention_layers: List[int] = field(
        default_factory=list,
        metadata={
            "help": "Transformer layers, counted from 0, that apply the attention map of the nearest other one before them "
            "(ARMHuBERT: every second, [1,3,5,7,9,11])"
        },
    )
    # training
    dropout: float = field(default=0.1, metadata={"help": "dropout behind attention and FFN"})
    attention_dropout: float = field(default=0.1, metadata={"help": "dropout of attention weights"})
    activation_dropout: float = field(default=0.0, metadata={"help": "dropout inside the FFN"})
    dropout_input: float = field(default=0.0, metadata={"help": "dropout in front of the Transformer"})
    encoder_layerdrop: float = field(default=0.0, metadata={"help": "probability of skipping a layer while training"})
    feature_grad_mult: float = field(default=1.0, metadata={"help": "scales the extractor's gradient; 0 freezes it"})
    shares_extractor: bool = field(
        default=False,
        metadata={
            "help": "the convolutions are the teacher's, frozen (feature_grad_mult=0), and run once per batch for both; the student "
            "keeps its own copy in checkpoints"
        },
    )
    checkpoint_activations: bool = field(
        default=False, metadata={"help": "recompute layers in the backward pass to save memory"}
    )
    # SpecAugment masks
    mask_prob: float = field(default=0.0, metadata={"help": "share of frames that start inside a masked span"})
    mask_length: int = field(default=10, metadata={"help": "length of a masked span, frames"})
    mask_selection: MASK_SELECTIONS = field(default="static", metadata={"help": "how span lengths are drawn"})  # type: ignore[valid-type]
    mask_other: float = field(default=0, metadata={"help": "second parameter of `mask_selection`"})
    no_mask_overlap: bool = field(default=False, metadata={"help": "spans do not overlap"})
    mask_min_space: int = field(default=1, metadata={"help": "frames between spans that do not overlap"})
    mask_channel_prob: float = field(
        default=0.0, metadata={"help": "share of channels that start inside a masked span"}
    )
    mask_channel_length: int = field(default=10, metadata={"help": "length of a masked span, channels"})
    mask_channel_selection: MASK_SELECTIONS = field(default="static", metadata={"help": "how span lengths are drawn"})  # type: ignore[valid-type]
    mask_channel_other: float = field(default=0, metadata={"help": "second parameter of `mask_channel_selection`"})
    no_mask_channel_overlap: bool = field(default=False, metadata={"help": "channel spans do not overlap"})
    mask_channel_min_space: int = field(default=1, metadata={"help": "channels between spans that do not overlap"})
    mask_channel_before: bool = field(default=False, metadata={"help": "mask channels before frames"})
    require_same_masks: bool = field(default=True, metadata={"help": "equally many masked frames in every utterance"})
    mask_dropout: float = field(default=0.0, metadata={"help": "share of masked frames that are opened again"})
    normalize: bool = II("task.normalize")
    seed: int = II("common.seed")


@register_model("ssl_student", dataclass=SslStudentConfig)
class SslStudent(StudentParts, SpeechEncoder, BaseFairseqModel):
    """The encoder under fairseq's keys, plus ``heads.*``, ``gates.*`` and ``lagrangian.*`` while it is distilled."""

    def __init__(self, cfg: SslStudentConfig, config: EncoderConfig) -> None:
        training = TrainingConfig(
            dropout=cfg.dropout,
            attention_dropout=cfg.attention_dropout,
            activation_dropout=cfg.activation_dropout,
            dropout_input=cfg.dropout_input,
            layerdrop=cfg.encoder_layerdrop,
            feature_grad_mult=cfg.feature_grad_mult,
            checkpoint_activations=cfg.checkpoint_activations,
        )
        masking = MaskConfig(**{f.name: getattr(cfg, f.name) for f in fields(MaskConfig)})
        super().__init__(config, training, masking)
        self.cfg = cfg
        if cfg.shares_extractor:  # an optimizer with flat parameters would decay them
            self.feature_extractor.requires_grad_(False)
        self.num_updates = 0
        self.add_parts(cfg, config)

    @classmethod
    def build_model(cls, cfg: SslStudentConfig, task: Any) -> "SslStudent":
        """Shape, weights, heads and gates; what was taken from files goes into ``cfg``, so that checkpoints rebuild alone."""
        start = None if cfg.encoder or not cfg.student_path else read_start(cfg, vars(SslStudentConfig()))
        if cfg.init_layers and not cfg.student_path and not cfg.encoder:
            raise ValueError(
                f"`model.init_layers` ({cfg.init_layers}) needs the checkpoint that layers are copied from; pass "
                "model.student_path=${task.teacher_path}, or leave it empty"
            )
        config = start.config if start is not None else config_from_options(cfg, "ssl_student")  # type: ignore[arg-type]
        config = replace(config, group_norm_over_padding=bool(cfg.group_norm_over_padding))
        cfg.encoder = config.to_json()
        cfg.encoder_embed_dim = config.output_dim  # what fine-tuning builds its head for
        fill_options(cfg, config, task, start)
        model = cls(cfg, config)
        if start is not None:
            model._load_start(start, str(cfg.student_path))
        return model

    def _load_start(self, start: ParsedCheckpoint, path: str) -> None:
        """Weights of the student, its gates, and heads where the file has them in the same shape."""
        state = start.encoder_state
        if self.cfg.init_layers == NO_LAYERS:
            state = {name: v for name, v in self.state_dict().items() if name.startswith(PARAMETER_PREFIXES)} | state
        self.load_encoder_state(state, path)
        self.load_parts(start, path)

    def forward(
        self,
        source: Tensor,
        padding_mask: Tensor | None = None,
        mask: bool = False,
        target_sparsity: float | None = None,
        masked: Tensor | None = None,
        num_layers: int | None = None,
        conv_features: Tensor | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """One pass of distillation.

        Args:
            source: [B, S], 16 kHz.
            padding_mask: [B, S], True = padding, or None.
            target_sparsity: where the size constraint is to be at this update; None leaves the penalty out.
            masked: [B, T], True = the frame is replaced by the mask embedding, see `draw_masks`; None hears everything.
            num_layers: run so many layers at least; heads may read deeper ones.
            conv_features: what `extract` gave for this batch, [B, T, C_conv]; None runs the convolutions.
        Returns:
            ``predictions`` (per pair [B, T, C_teacher]; of the first teacher) and ``other_predictions`` (the same per further
            teacher), ``hidden_states`` by layer, ``padding_mask`` (True = no prediction) and ``masked`` [B, T] at the teachers'
            frame rate, ``expected_sparsity`` and ``penalty`` (scalars, None without gates).
        """
        assert self.heads is not None or num_layers is not None, "a student needs heads, or layers to compare"
        gates = self.gate_values()
        deepest = max(num_layers or 0, self.heads.deepest_layer if self.heads is not None else 0)
        out = SpeechEncoder.forward(
            self,
            source,
            padding_mask,
            mask=mask,
            gates=gates,
            num_layers=deepest,
            masked=masked,
            conv_features=conv_features,
        )
        expected, penalty = self.size_constraint(target_sparsity)
        predictions, padding_mask = self.predict(out)
        return {
            "predictions": predictions[0] if predictions else [],
            "other_predictions": predictions[1:],
            "hidden_states": out.hidden_states,
            "padding_mask": padding_mask,
            "masked": out.masked,
            "expected_sparsity": expected,
            "penalty": penalty,
        }

    def extract_features(
        self, source: Tensor, padding_mask: Tensor | None, mask: bool = False, layer: int | None = None, **_: Any
    ) -> dict[str, Any]:
        """fairseq's interface of pre-trained encoders.

        Args:
            layer: stop behind this layer, 0-based as in fairseq; None runs all.
        Returns:
            ``x`` [B, T, C], ``padding_mask`` [B, T] or None, ``features`` [B, T_features, C_conv], ``layer_results``: per layer
            (output [T, B, C], None, FFN output before the residual [T, B, C]), ``hidden_states``: L+1 tensors [B, T, C].
        """
        gates = self.gates.deterministic() if self.gates is not None else None
        out = SpeechEncoder.forward(
            self, source, padding_mask, mask=mask, gates=gates, num_layers=None if layer is None else layer + 1
        )
        x = out.hidden_states[-1] if layer is not None else out.x
        results = [
            (h.transpose(0, 1), None, f.transpose(0, 1))
            for h, f in zip(out.hidden_states[1:], out.ffn_outputs, strict=True)
        ]
        return {
            "x": x,
            "padding_mask": out.padding_mask,
            "features": out.features,
            "layer_results": results,
            "hidden_states": out.hidden_states,
        }

    def remove_pretraining_modules(self, last_layer: int | None = None) -> None:
        """Drops heads and multipliers; gates that were not pruned yet stay, frozen, since they are part of the function."""
        self.heads = None
        self.lagrangian = None
        self.feature_extractor.requires_grad_(True)  # of `shares_extractor`; fine-tuning has its own feature_grad_mult
        if self.gates is not None:
            self.gates.requires_grad_(False)

    def set_num_updates(self, num_updates: int) -> None:
        super().set_num_updates(num_updates)
        self.num_updates = num_updates
