"""`wav2vec_ctc_st`: S3-Router. A CTC model whose weights stay as they are while binary masks over them are learned."""

# no `from __future__ import annotations`: fairseq reads the types of config fields
import logging
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional

from fairseq.dataclass import ChoiceEnum
from fairseq.models import BaseFairseqModel, register_model
from fairseq.models.wav2vec.wav2vec2_asr import Wav2Vec2CtcConfig, Wav2VecCtc
from torch import Tensor

from s3distill import compat
from s3distill.masks.modules import kept_share
from s3distill.masks.network import MaskedNetwork, check_something_learns
from s3distill.masks.options import LINEAR_ST_OPS, MaskOptions
from s3distill.masks.scores import INITS
from s3distill.masks.selection import PATTERNS
from s3distill.masks.state import adopt_state
from s3distill.models._fine_tuning import FineTunedEncoder, read_backbone

logger = logging.getLogger(__name__)


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


@register_model("wav2vec_ctc_st", dataclass=Wav2VecCtcStConfig)
class Wav2VecCtcSt(BaseFairseqModel):
    """Frozen encoder, learned masks, CTC head, under S3-Router's keys (``w2v_encoder.w2v_model.…weight``, ``….scores``)."""

    get_logits = Wav2VecCtc.get_logits  # padded frames become blanks, as in fairseq's own CTC model
    get_normalized_probs = Wav2VecCtc.get_normalized_probs

    def __init__(self, cfg: Wav2VecCtcStConfig, w2v_encoder: FineTunedEncoder) -> None:
        super().__init__()
        self.cfg = cfg
        self.w2v_encoder = w2v_encoder
        self.blank_weight, self.blank_mode = cfg.blank_weight, cfg.blank_mode

    @classmethod
    def build_model(cls, cfg: Wav2VecCtcStConfig, task: Any) -> "Wav2VecCtcSt":
        """Options, backbone, head, masks; what was read goes into ``cfg.w2v_args``, so that checkpoints rebuild alone."""
        options = MaskOptions.from_mapping(vars(cfg) if not hasattr(cfg, "items") else cfg)
        backbone = read_backbone(cfg)
        network = FineTunedEncoder(cfg, backbone.config, len(task.target_dictionary), extractor_learns(cfg, options))
        if backbone.encoder_state is not None:
            network.w2v_model.load_encoder_state(backbone.encoder_state, str(cfg.w2v_path))
        network.add_masks(options)
        if not cfg.eval_only:
            check_something_learns(network, options)
        _report(network, options)
        return cls(cfg, network)

    def forward(self, source: Tensor, padding_mask: Optional[Tensor] = None, **_: Any) -> Dict[str, Any]:
        """[B, S] -> ``encoder_out`` [T, B, V] (logits), ``padding_mask`` [B, T] or None, ``layer_results``."""
        return self.w2v_encoder.run(source, padding_mask)

    def load_state_dict(self, state_dict: Any, strict: bool = True, model_cfg: Any = None, args: Any = None) -> Any:
        """Takes a run of this model whole; from a new run's start (``finetune_from_model``) what ``load_mask_*`` leave."""
        own = {k.removeprefix("w2v_encoder."): v for k, v in state_dict.items() if k.startswith("w2v_encoder.")}
        options = self.w2v_encoder.options
        assert options is not None
        masks_only = (options.load_mask_only or options.load_mask_before > 0) and compat.starts_from_another_run()
        adopt_state(self.w2v_encoder, own, masks_only)

    def set_num_updates(self, num_updates: int) -> None:
        super().set_num_updates(num_updates)
        self.w2v_encoder.num_updates = num_updates

    def prepare_for_inference_(self, cfg: Any) -> None:
        """`fairseq-generate` calls this: masks are multiplied in, decoding costs what a dense model costs."""
        self.w2v_encoder.bake()


def extractor_learns(cfg: Wav2VecCtcStConfig, options: MaskOptions) -> bool:
    """Whether the conv extractor's scores learn; fairseq's recipes say feature_grad_mult=0, which freezes its weights only."""
    return not options.no_prune_extractor and not options.fix_mask and options.fix_mask_before == 0


def _report(network: MaskedNetwork, options: MaskOptions) -> None:
    masked = network.masked_modules()
    num_scores = sum(m.scores.numel() for m in masked.values())
    num_other = sum(p.numel() for n, p in network.named_parameters() if p.requires_grad and not n.endswith(".scores"))
    logger.info(
        "%d masks (%s) with %s scores keep %.2f%% of their connections; other parameters that learn: %s",
        *(len(masked), options.pattern, f"{num_scores:,}", 100 * kept_share(iter(masked.items())), f"{num_other:,}"),
    )
