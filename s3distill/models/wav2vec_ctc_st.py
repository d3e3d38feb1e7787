"""`wav2vec_ctc_st`: S3-Router. A CTC model whose weights stay as they are while binary masks over them are learned.

``prune_method`` makes it one of the methods that S3-Router's pruning is compared with, in which weights learn and masks follow them.
"""

# no `from __future__ import annotations`: fairseq reads the types of config fields
from dataclasses import dataclass, field
from typing import Any, List, Optional

from fairseq.dataclass import ChoiceEnum
from fairseq.models import register_model
from fairseq.models.wav2vec.wav2vec2_asr import Wav2Vec2CtcConfig, Wav2VecCtc
from omegaconf import II

from s3distill.masks.magnitude import METHODS
from s3distill.masks.options import LINEAR_ST_OPS
from s3distill.masks.scores import INITS
from s3distill.masks.selection import PATTERNS
from s3distill.models._fine_tuning import FineTunedEncoder, MaskedFairseqModel, build_masked


@dataclass
class Wav2VecCtcStConfig(Wav2Vec2CtcConfig):
    """fairseq's `wav2vec_ctc` options and S3-Router's, under its names; every ``*prune_rate`` is a KEPT fraction."""

    prune_rate: float = field(default=0.5, metadata={"help": "kept fraction of every masked matrix; 0.9 removes 10%"})
    no_prune_proj: bool = field(default=True, metadata={"help": "False: the CTC head is masked too"})
    no_prune_extractor: bool = field(
        default=True,
        metadata={"help": "False: the conv extractor is masked (its scores learn with feature_grad_mult=0 too)"},
    )
    no_prune_pos: bool = field(default=True, metadata={"help": "False: the positional convolution is masked"})
    no_prune_post_extract_proj: bool = field(
        default=False, metadata={"help": "False: the projection of the conv features is masked"}
    )
    trainable_bias: bool = field(default=False, metadata={"help": "all biases learn"})
    trainable_layer_norm: bool = field(default=False, metadata={"help": "the LayerNorms learn"})
    trainable_pos: bool = field(default=False, metadata={"help": "the positional convolution's weights learn"})
    trainable_proj: bool = field(default=False, metadata={"help": "the CTC head's weights learn"})
    trainable_post_extract_proj: bool = field(
        default=False, metadata={"help": "the weights of the conv features' projection learn"}
    )
    trainable_if_unpruned: bool = field(default=False, metadata={"help": "every module without a mask learns"})
    co_train: bool = field(default=False, metadata={"help": "all weights learn, along with the scores"})
    init_score: ChoiceEnum(list(INITS)) = field(  # type: ignore[valid-type]
        default="kaiming_uniform",
        metadata={
            "help": "where scores start; those named after weights take them from w2v_path, or from "
            "checkpoint.finetune_from_model where that is given"
        },
    )
    init_score_scale: float = field(
        default=1.0, metadata={"help": "of weight_magnitude_with_scale: scores = weight / scale"}
    )
    fix_attn: bool = field(default=False, metadata={"help": "attention is not masked"})
    fix_fc: bool = field(default=False, metadata={"help": "the FFN is not masked"})
    layerwise_prune_rate: Optional[List[float]] = field(
        default=None, metadata={"help": "one kept fraction per encoder layer; [] or null: prune_rate everywhere"}
    )
    fc_attn_prune_rate: Optional[List[float]] = field(
        default=None, metadata={"help": "[FFN, attention] kept fractions; [] or null: prune_rate for both"}
    )
    ste_sigmoid: bool = field(
        default=False, metadata={"help": "scale the scores' gradient by the derivative of sigmoid(|score|)"}
    )
    linear_st_op: ChoiceEnum(list(LINEAR_ST_OPS)) = field(  # type: ignore[valid-type]
        default="linear_st",
        metadata={
            "help": "linear_st: a score per connection; linear_st_outstr: per output; linear_st_instr: per input"
        },
    )
    mask_pattern: ChoiceEnum(list(PATTERNS)) = field(  # type: ignore[valid-type]
        default="unstructured",
        metadata={
            "help": "what a mask may look like: any connections, 2 of 4 neighbouring inputs, whole rows or columns"
        },
    )
    fix_mask: bool = field(default=False, metadata={"help": "no scores learn"})
    fix_mask_before: int = field(
        default=0, metadata={"help": "no scores below this encoder layer learn, nor those in front of the layers"}
    )
    load_mask_only: bool = field(
        default=False, metadata={"help": "take only the scores from checkpoint.finetune_from_model"}
    )
    load_mask_before: int = field(
        default=0,
        metadata={"help": "take only the scores below this encoder layer from checkpoint.finetune_from_model"},
    )
    eval_only: bool = field(default=False, metadata={"help": "validate once and stop"})
    prune_method: ChoiceEnum(list(METHODS)) = field(  # type: ignore[valid-type]
        default="s3_router",
        metadata={
            "help": "s3_router: masks are learned. Else all weights learn and masks keep the largest: omp prunes once, at the start; "
            "imp in prune_steps; parp sets to 0 what may grow back, every prune_interval updates"
        },
    )
    prune_interval: Optional[int] = field(default=None, metadata={"help": "updates between prunings (imp, parp)"})
    prune_steps: Optional[int] = field(
        default=None,
        metadata={"help": "prunings until prune_rate is reached, on a cubic schedule (imp; parp: null = 1)"},
    )
    max_update: int = II("optimization.max_update")


@register_model("wav2vec_ctc_st", dataclass=Wav2VecCtcStConfig)
class Wav2VecCtcSt(MaskedFairseqModel):
    """Frozen encoder, learned masks, CTC head, under S3-Router's keys (``w2v_encoder.w2v_model.…weight``, ``….scores``)."""

    get_logits = Wav2VecCtc.get_logits  # padded frames become blanks, as in fairseq's own CTC model
    get_normalized_probs = Wav2VecCtc.get_normalized_probs

    def __init__(self, cfg: Wav2VecCtcStConfig, w2v_encoder: FineTunedEncoder) -> None:
        super().__init__(cfg, w2v_encoder)
        self.blank_weight, self.blank_mode = cfg.blank_weight, cfg.blank_mode

    @classmethod
    def build_model(cls, cfg: Wav2VecCtcStConfig, task: Any) -> "Wav2VecCtcSt":
        """A head with one output per symbol of the dictionary, for every frame."""
        if task.target_dictionary is None:
            raise ValueError(
                f"`model._name` wav2vec_ctc_st needs a task with a dictionary, but the task is {type(task).__name__}; pass "
                "task._name=audio_ctc, or model._name=wav2vec_label_st for one label per utterance"
            )
        return cls(cfg, build_masked(cfg, len(task.target_dictionary)))
