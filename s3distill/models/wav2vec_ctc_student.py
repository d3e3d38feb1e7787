"""`wav2vec_ctc_student`: a CTC model that is distilled from a fine-tuned one, pruned by gates and masked, all in one run."""

# no `from __future__ import annotations`: fairseq reads the types of config fields
from dataclasses import dataclass, field
from typing import Any, Dict, Optional, Sequence

from fairseq.models import register_model
from fairseq.models.wav2vec.wav2vec2_asr import Wav2VecCtc
from omegaconf import II
from torch import Tensor

from s3distill.encoder.conv import ConvExtractor
from s3distill.encoder.model import SpeechEncoder
from s3distill.encoder.training_config import MaskConfig, TrainingConfig
from s3distill.masks.state import SCORES, load_weights
from s3distill.models._ctc_start import masks_of, new_parts, read_ctc_start
from s3distill.models._fine_tuning import FineTunedEncoder, MaskedFairseqModel, build_network
from s3distill.models._gate_options import GateOptions
from s3distill.models._head_options import HeadOptions
from s3distill.models._student_parts import PART_PREFIXES, StudentParts, fill_options
from s3distill.models.wav2vec_ctc_st import Wav2VecCtcStConfig


@dataclass
class Wav2VecCtcStudentConfig(HeadOptions, GateOptions, Wav2VecCtcStConfig):
    """fairseq's `wav2vec_ctc` options; of `ssl_student` those of heads and gates, and of `wav2vec_ctc_st` those of masks."""

    w2v_path: Optional[str] = field(
        default=None, metadata={"help": "pre-trained encoder to start from, with a new head"}
    )
    student_path: Optional[str] = field(
        default=None,
        metadata={
            "help": "fine-tuned CTC checkpoint to start from instead: shape, weights and head, masks multiplied in; prediction heads come "
            "along where they fit"
        },
    )
    masks: bool = field(
        default=False,
        metadata={
            "help": "binary masks over the weights, by the options of wav2vec_ctc_st, which then say what learns; false: all weights learn"
        },
    )
    shares_extractor: bool = field(
        default=False,
        metadata={
            "help": "the convolutions are the teacher's, frozen (feature_grad_mult=0), and run once per batch for both; the student "
            "keeps its own copy in checkpoints"
        },
    )
    seed: int = II("common.seed")


@register_model("wav2vec_ctc_student", dataclass=Wav2VecCtcStudentConfig)
class Wav2VecCtcStudent(StudentParts, MaskedFairseqModel):
    """Encoder and CTC head under fairseq's keys (``w2v_encoder.…``), plus ``heads.*``, ``gates.*`` and ``lagrangian.*``.

    Without masks everything learns as in stock `wav2vec_ctc`. Gates multiply what masked weights compute. While
    ``freeze_finetune_updates`` freezes the encoder, its gates get no gradient either, and the size constraint waits.
    """

    get_logits = Wav2VecCtc.get_logits  # padded frames become blanks, as in fairseq's own CTC model
    get_normalized_probs = Wav2VecCtc.get_normalized_probs

    def __init__(self, cfg: Wav2VecCtcStudentConfig, w2v_encoder: FineTunedEncoder) -> None:
        super().__init__(cfg, w2v_encoder)
        self.blank_weight, self.blank_mode = cfg.blank_weight, cfg.blank_mode
        self.config = self.encoder.config
        if cfg.shares_extractor:  # an optimizer with flat parameters would decay them
            self.encoder.feature_extractor.requires_grad_(False)
        self.add_parts(cfg, self.config)

    @classmethod
    def build_model(cls, cfg: Wav2VecCtcStudentConfig, task: Any) -> "Wav2VecCtcStudent":
        """Shape, weights and head, masks, prediction heads, gates; what was read goes into ``cfg``, so that checkpoints rebuild alone."""
        if task.target_dictionary is None:
            raise ValueError(
                f"`model._name` wav2vec_ctc_student needs a task with a dictionary, but the task is {type(task).__name__}; pass "
                "task._name=audio_ctc_distill"
            )
        rebuilds = cfg.w2v_args is not None
        if not rebuilds:
            cls._check_start(cfg, task)
        options = masks_of(cfg)
        backbone, start = read_ctc_start(cfg, task.target_dictionary.symbols)
        if options is not None and not rebuilds:
            options.check_start(backbone.config.num_layers)
        network = build_network(cfg, backbone, len(task.target_dictionary), options)
        fill_options(cfg, backbone.config, task, start)
        model = cls(cfg, network)
        if start is not None:
            model.load_parts(start, str(cfg.student_path))
        return model

    @staticmethod
    def _check_start(cfg: Wav2VecCtcStudentConfig, task: Any) -> None:
        parts = new_parts(cfg)
        if parts and not hasattr(task, "teachers"):
            raise ValueError(
                f"`model.{parts[0]}` is for a distillation, but the task is {type(task).__name__}, in which nothing would train it; pass "
                "task._name=audio_ctc_distill and criterion._name=ctc_distill, or leave it out"
            )
        if cfg.distill_layers and str(cfg.head_init) == "least_squares":
            raise ValueError(
                "`model.head_init` least_squares is fitted by audio_distill only; wav2vec_ctc_student takes identity or default"
            )
        if cfg.shares_extractor and cfg.masks and not cfg.no_prune_extractor:
            raise ValueError(
                "`model.shares_extractor` leaves the convolutions as the teacher's, but model.no_prune_extractor=false masks them; leave "
                "one of them out"
            )

    @property
    def encoder(self) -> SpeechEncoder:
        return self.w2v_encoder.w2v_model

    # what the checks and criterions of a distillation read of a student, see `ssl_student`
    @property
    def training_config(self) -> TrainingConfig:
        return self.encoder.training_config

    @property
    def masking(self) -> MaskConfig:
        return self.encoder.masking

    @property
    def feature_extractor(self) -> ConvExtractor:
        return self.encoder.feature_extractor

    def extract(self, source: Tensor, padding_mask: Optional[Tensor] = None) -> Tensor:
        """See `SpeechEncoder.extract`."""
        return self.encoder.extract(source, padding_mask)

    def draw_masks(self, source: Tensor, padding_mask: Optional[Tensor], seeds: Sequence[Sequence[int]]) -> Tensor:
        """See `SpeechEncoder.draw_masks`."""
        return self.encoder.draw_masks(source, padding_mask, seeds)

    def forward(  # type: ignore[override]
        self,
        source: Tensor,
        padding_mask: Optional[Tensor] = None,
        predict: bool = False,
        target_sparsity: Optional[float] = None,
        masked: Optional[Tensor] = None,
        conv_features: Optional[Tensor] = None,
        **_: Any,
    ) -> Dict[str, Any]:
        """Waveforms to logits, and with ``predict`` what a distillation compares.

        Args:
            source: [B, S], 16 kHz.
            padding_mask: [B, S], True = padding, or None.
            predict: run the prediction heads and the size constraint too.
            target_sparsity: where the size constraint is to be at this update; None leaves the penalty out.
            masked: [B, T], True = the frame is replaced by the mask embedding; None: SpecAugment's own draw, where
                ``apply_mask`` says so.
            conv_features: what the encoder's `extract` gave for this batch, [B, T, C_conv]; None runs the convolutions.
        Returns:
            ``encoder_out`` [T, B, V] (logits), ``padding_mask`` [B, T] or None, ``layer_results``; with ``predict`` also ``x``,
            the encoder's output [B, T, C], ``predictions`` (per pair [B, T, C_teacher]) and ``prediction_padding_mask`` [B, T] or
            None, ``hidden_states`` by layer, ``expected_sparsity`` and ``penalty`` (scalars, None without gates).
        """
        result, out = self.w2v_encoder.encode(
            source, padding_mask, gates=self.gate_values(), masked=masked, conv_features=conv_features
        )
        if predict:
            expected, penalty = self.size_constraint(target_sparsity)
            predictions, prediction_padding_mask = self.predict(out)
            result |= {
                "x": out.x,
                "predictions": predictions[0] if predictions else [],
                "prediction_padding_mask": prediction_padding_mask,
                "hidden_states": out.hidden_states,
                "expected_sparsity": expected,
                "penalty": penalty,
            }
        return result

    def load_state_dict(self, state_dict: Any, strict: bool = True, model_cfg: Any = None, args: Any = None) -> Any:
        """Takes a run of this model whole; from another model's (``finetune_from_model``) encoder, head and masks alone.

        Raises:
            ValueError: it is of another model, has masks that this one has not, or lacks heads or gates of a run of this model.
        """
        if self.w2v_encoder.options is not None:
            super().load_state_dict(state_dict, strict, model_cfg, args)
        elif any(name.endswith(SCORES) for name in state_dict):
            raise ValueError(
                "the checkpoint has masks beside its weights, which model.masks=false would lose; multiply them in first (s3distill masks "
                "bake RUN OUT), or pass model.masks=true"
            )
        else:
            prefix = "w2v_encoder."
            load_weights(
                self.w2v_encoder, {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
            )
        self._load_parts_state({k: v for k, v in state_dict.items() if k.startswith(PART_PREFIXES)})

    def _load_parts_state(self, state: Dict[str, Tensor]) -> None:
        own = {k: v for k, v in self.state_dict().items() if k.startswith(PART_PREFIXES)}
        if not state:  # a model that was never distilled: heads and gates start as they were built
            return
        differing = sorted(set(own) ^ set(state)) or sorted(k for k in own if own[k].shape != state[k].shape)
        if differing:
            raise ValueError(
                f"the checkpoint must have the prediction heads and gates of this student, but {', '.join(differing[:4])} "
                f"({len(differing)} in all) are not in both, or of another shape; pass the run's own model.distill_layers, head_* and "
                "prune_units, or start from its pruned checkpoint (model.student_path)"
            )
        for name, value in state.items():
            own[name].copy_(value)
