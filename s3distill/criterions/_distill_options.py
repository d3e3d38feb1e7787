"""Options that the criterions of distillations have in common."""

# no `from __future__ import annotations`: fairseq reads the types of config fields
from dataclasses import dataclass, field

from fairseq.dataclass import ChoiceEnum, FairseqDataclass

from s3distill.losses import COSINES, TARGET_NORMS, TEMPORAL_NORMS


@dataclass
class HiddenStateOptions(FairseqDataclass):
    """The distance between predictions and the teacher's hidden states; defaults are DPHuBERT's."""

    l1_weight: float = field(default=1.0, metadata={"help": "weight of mean |prediction - target|"})
    l2_weight: float = field(default=0.0, metadata={"help": "weight of mean (prediction - target)^2"})
    cosine_weight: float = field(default=1.0, metadata={"help": "weight of the cosine term"})
    cosine_type: ChoiceEnum(list(COSINES)) = field(  # type: ignore[valid-type]
        default="raw", metadata={"help": "raw: -cos; log_sig: -log sigmoid(cos)"}
    )
    layer_weights: str = field(
        default="", metadata={"help": "one weight per matched layer, e.g. '0.1,0.1,1'; empty: 1 each, summed"}
    )
    target_norm: ChoiceEnum(list(TARGET_NORMS)) = field(  # type: ignore[valid-type]
        default="none",
        metadata={
            "help": "targets of the heads get zero mean and unit variance: instance: per channel over time (data2vec's for "
            "speech); layer: per frame over channels; predictions are left as they are"
        },
    )


@dataclass
class TemporalOptions(FairseqDataclass):
    """Temporal relations (STaR)."""

    temporal_layer_weight: float = field(
        default=0.0, metadata={"help": "weight of frame-to-frame relations within each layer (STaR: layer-wise)"}
    )
    temporal_intra_weight: float = field(
        default=0.0, metadata={"help": "weight of relations between input and output of each layer (STaR: intra-layer)"}
    )
    temporal_inter_weight: float = field(
        default=0.0, metadata={"help": "weight of relations between consecutive matched layers"}
    )
    temporal_layers: str = field(
        default="",
        metadata={
            "help": "layers whose temporal relations are matched, written like model.distill_layers; empty: those"
        },
    )
    temporal_norm: ChoiceEnum(list(TEMPORAL_NORMS)) = field(  # type: ignore[valid-type]
        default="channels",
        metadata={"help": "inner products of frames over their number of channels (STaR), or cosine, free of norms"},
    )


@dataclass
class SizeOptions(FairseqDataclass):
    """Where gates are to bring the student's size; defaults are DPHuBERT's."""

    target_sparsity: float = field(
        default=0.0,
        metadata={"help": "share of the reference cost (model.prune_measure) to remove; needs model.prune_units"},
    )
    target_rtf: float = field(
        default=0.0,
        metadata={
            "help": "instead of target_sparsity: real-time factor to reach on the machine of model.latency_table (model.prune_measure="
            "latency), seconds per second of audio"
        },
    )
    sparsity_warmup: int = field(
        default=5000,
        metadata={"help": "updates in which the target rises linearly from 0 (a smaller student: from its own)"},
    )
