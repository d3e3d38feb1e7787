"""The options of S3-Router as plain values: checked, and turned into the list of modules that are masked and that learn."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from s3distill.encoder.config import EncoderConfig
from s3distill.encoder.variants import owner
from s3distill.masks.magnitude import METHODS, PruningSchedule
from s3distill.masks.modules import MaskRule
from s3distill.masks.scores import INITS
from s3distill.masks.selection import PATTERNS

LINEAR_ST_OPS = {"linear_st": None, "linear_st_outstr": "rows", "linear_st_instr": "columns"}  # -> pattern

ENCODER = "w2v_model"  # name of the encoder in fairseq's fine-tuned models, and of the head beside it
HEAD = "proj"
ATTENTION_LINEARS = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj")
VALUE_LINEARS = ("self_attn.v_proj", "self_attn.out_proj")  # what a layer has that applies another's attention map
FFN_LINEARS = ("fc1", "fc2")


@dataclass(frozen=True)
class MaskOptions:
    """What is masked and what learns; names and meaning are S3-Router's (see `models.wav2vec_ctc_st`).

    ``prune_rate`` and the lists hold *kept* fractions (densities).

    Raises:
        ValueError: a value or a combination is out of range; the message names option, rule, value and remedy.
    """

    prune_rate: float = 0.5
    no_prune_proj: bool = True
    no_prune_extractor: bool = True
    no_prune_pos: bool = True
    no_prune_post_extract_proj: bool = False
    trainable_bias: bool = False
    trainable_layer_norm: bool = False
    trainable_pos: bool = False
    trainable_proj: bool = False
    trainable_post_extract_proj: bool = False
    trainable_if_unpruned: bool = False
    co_train: bool = False
    init_score: str = "kaiming_uniform"
    init_score_scale: float = 1.0
    fix_attn: bool = False
    fix_fc: bool = False
    layerwise_prune_rate: Sequence[float] = ()
    fc_attn_prune_rate: Sequence[float] = ()
    ste_sigmoid: bool = False
    linear_st_op: str = "linear_st"
    mask_pattern: str = "unstructured"
    fix_mask: bool = False
    fix_mask_before: int = 0
    load_mask_only: bool = False
    load_mask_before: int = 0
    prune_method: str = "s3_router"
    prune_interval: int | None = None
    prune_steps: int | None = None

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> MaskOptions:
        """Picks this class's fields out of a model's options; None in place of a list is an empty one.

        Raises:
            ValueError: a yes-or-no option is neither.
        """
        picked: dict[str, Any] = {}
        for f in dataclasses.fields(cls):
            if f.name not in values:
                continue
            value = values[f.name]
            if f.name.endswith("wise_prune_rate") or f.name == "fc_attn_prune_rate":
                value = () if value is None else tuple(float(v) for v in value)
            elif f.name in ("init_score", "linear_st_op", "mask_pattern", "prune_method"):
                value = str(getattr(value, "value", value))
            elif isinstance(f.default, bool) and not isinstance(value, bool):
                raise ValueError(
                    f"`{f.name}` must be true or false, but is {value!r}; give it as a boolean, without quotes"
                )
            picked[f.name] = value
        return cls(**picked)

    def __post_init__(self) -> None:
        _require_density("prune_rate", self.prune_rate)
        for name in ("layerwise_prune_rate", "fc_attn_prune_rate"):
            for i, value in enumerate(getattr(self, name)):
                _require_density(f"{name}[{i}]", value)
        _require_choice("init_score", self.init_score, INITS)
        _require_choice("linear_st_op", self.linear_st_op, tuple(LINEAR_ST_OPS))
        _require_choice("mask_pattern", self.mask_pattern, PATTERNS)
        if self.init_score_scale == 0 or not math.isfinite(self.init_score_scale):
            raise ValueError(
                f"`init_score_scale` divides the weights, so it must be finite and not 0, but is {self.init_score_scale}; pass 1"
            )
        if self.fc_attn_prune_rate and len(self.fc_attn_prune_rate) != 2:
            raise ValueError(
                f"`fc_attn_prune_rate` must be [fc, attention], two kept fractions, but has {len(self.fc_attn_prune_rate)}; pass e.g. "
                "[0.9,0.95], or [] for one density everywhere"
            )
        if self.fc_attn_prune_rate and self.layerwise_prune_rate:
            raise ValueError(
                "`layerwise_prune_rate` and `fc_attn_prune_rate` both say how much of a layer is kept; leave one of them empty ([])"
            )
        others = self._masked_outside_layers()
        if self.fc_attn_prune_rate and others:
            raise ValueError(
                f"`fc_attn_prune_rate` says nothing about other modules, but {', '.join(others)} would be masked too; set "
                f"{', '.join(f'no_prune_{o}=true' for o in others)}, or use prune_rate"
            )
        implied = LINEAR_ST_OPS[self.linear_st_op]
        if implied is not None and self.mask_pattern not in ("unstructured", implied):
            raise ValueError(
                f"`linear_st_op` {self.linear_st_op} means the pattern {implied}, but `mask_pattern` is {self.mask_pattern}; set only "
                "one of them"
            )
        if self.pattern == "2:4":
            for name, value in self._densities():
                if value not in (0.5, 1.0):
                    raise ValueError(f"`mask_pattern` 2:4 keeps exactly half, but `{name}` is {value}; set it to 0.5")
        for name in ("fix_mask_before", "load_mask_before"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` counts layers and must be at least 0, but is {getattr(self, name)}")
        self._check_method()

    def check_start(self, num_layers: int) -> None:
        """Refuses, where a training starts, what S3-Router would ignore; its own checkpoints may say it and load.

        Args:
            num_layers: Transformer layers of the encoder.
        Raises:
            ValueError: modules outside of the layers beside ``layerwise_prune_rate``, or a layer that is not there.
        """
        # the projection is masked by default, and left whole as in S3-Router
        others = [f"no_prune_{name}" for name in self._masked_outside_layers() if name != "post_extract_proj"]
        if self.layerwise_prune_rate and others:
            raise ValueError(
                f"`layerwise_prune_rate` leaves what is outside of the layers whole, but {', '.join(f'{n}=false' for n in others)} would "
                f"mask it; set {', '.join(f'{n}=true' for n in others)}, or use prune_rate"
            )
        for name in ("fix_mask_before", "load_mask_before"):
            if getattr(self, name) > num_layers:
                raise ValueError(
                    f"`{name}` names a layer and must be at most {num_layers}, the encoder's layers, but is {getattr(self, name)}"
                )

    def _check_method(self) -> None:
        _require_choice("prune_method", self.prune_method, METHODS)
        self.schedule()
        if self.learns_scores:
            return
        if self.init_score not in (MaskOptions.init_score, "weight_magnitude_with_scale"):  # which ranks like |weight|
            raise ValueError(
                f"`init_score` is about learned scores, but is {self.init_score} with prune_method={self.prune_method}, whose scores are "
                "|weight|; leave it out, or pass prune_method=s3_router"
            )
        for name in ("ste_sigmoid", "fix_mask", "fix_mask_before", "load_mask_only", "load_mask_before"):
            value, default = getattr(self, name), getattr(MaskOptions, name)
            if value != default:
                raise ValueError(
                    f"`{name}` is about learned scores, but is {value} with prune_method={self.prune_method}, whose scores are "
                    f"|weight|; leave it at {default}, or pass prune_method=s3_router"
                )

    @property
    def learns_scores(self) -> bool:
        """S3-Router; the other methods take the magnitudes of the weights."""
        return self.prune_method == "s3_router"

    @property
    def weights_learn(self) -> bool:
        """``co_train``, and every method but S3-Router."""
        return self.co_train or not self.learns_scores

    def schedule(self) -> PruningSchedule:
        """When ``omp``, ``imp`` and ``parp`` prune."""
        return PruningSchedule.of(self.prune_method, self.prune_steps, self.prune_interval, self.pattern)

    @property
    def pattern(self) -> str:
        """The pattern in force: ``mask_pattern``, or what ``linear_st_op`` implies."""
        return LINEAR_ST_OPS[self.linear_st_op] or self.mask_pattern

    def _densities(self) -> Iterator[tuple[str, float]]:
        if self.layerwise_prune_rate:
            yield from ((f"layerwise_prune_rate[{i}]", v) for i, v in enumerate(self.layerwise_prune_rate))
        elif self.fc_attn_prune_rate:
            yield from ((f"fc_attn_prune_rate[{i}]", v) for i, v in enumerate(self.fc_attn_prune_rate))
        else:
            yield "prune_rate", self.prune_rate

    def _masked_outside_layers(self) -> list[str]:
        names = ("proj", "extractor", "pos", "post_extract_proj")
        return [n for n in names if not getattr(self, f"no_prune_{n}")]

    def rules(self, config: EncoderConfig) -> dict[str, MaskRule]:
        """Which modules are masked and how: name below `MaskedNetwork` -> rule, encoder first, head last.

        Modules with density 1 are not masked at all, nor are those that have no weights (pruned to nothing), nor is the time
        reduction, which S3-Router's models do not have. A weight that several layers share has one mask, under its owner's name.

        Raises:
            ValueError: ``layerwise_prune_rate`` has another length than the encoder has layers, or layers that share parameters
                are to keep different fractions.
        """
        if self.layerwise_prune_rate and len(self.layerwise_prune_rate) != config.num_layers:
            raise ValueError(
                f"`layerwise_prune_rate` must have one kept fraction for each of the {config.num_layers} encoder layers, but has "
                f"{len(self.layerwise_prune_rate)}; [] means prune_rate everywhere"
            )
        densities = dict(self._outside(config, in_front=True))
        for i, layer in enumerate(config.layers):
            prefix = f"{ENCODER}.encoder.layers.{i}"
            if layer.attention and layer.num_heads > 0 and not self.fix_attn and self._owns(config, "attention", i):
                linears = ATTENTION_LINEARS if not layer.reuses_attention else VALUE_LINEARS
                densities |= {f"{prefix}.{name}": self._layer_density(i, attention=True) for name in linears}
            if layer.ffn and layer.ffn_dim > 0 and not self.fix_fc and self._owns(config, "ffn", i):
                densities |= {f"{prefix}.{name}": self._layer_density(i, attention=False) for name in FFN_LINEARS}
        densities |= dict(self._outside(config, in_front=False))
        return {
            name: MaskRule(density, self.pattern, self.ste_sigmoid)
            for name, density in densities.items()
            if density < 1
        }

    def _owns(self, config: EncoderConfig, part: str, layer: int) -> bool:
        """Whether the weights are the layer's own; where they are another's, both must be given one density."""
        first, attention = owner(config, part, layer), part == "attention"
        densities = self._layer_density(first, attention), self._layer_density(layer, attention)
        if densities[0] != densities[1]:
            raise ValueError(
                f"`layerwise_prune_rate` must be the same for layers that share their weights, but is {densities[0]} for layer {first} "
                f"and {densities[1]} for layer {layer}; give both one kept fraction"
            )
        return first == layer

    def _layer_density(self, layer: int, attention: bool) -> float:
        if self.layerwise_prune_rate:
            return self.layerwise_prune_rate[layer]
        if self.fc_attn_prune_rate:
            return self.fc_attn_prune_rate[int(attention)]
        return self.prune_rate

    def _outside(self, config: EncoderConfig, in_front: bool) -> Iterator[tuple[str, float]]:
        """Modules outside of the layers; a density per layer leaves them whole, as in S3-Router."""
        density = 1.0 if self.layerwise_prune_rate else self.prune_rate
        if not in_front:
            if not self.no_prune_proj:
                yield HEAD, density
            return
        if not self.no_prune_extractor:
            for i, conv in enumerate(config.conv_layers):
                # of a separable convolution the pointwise half: the other has no more than a kernel per channel
                suffix = "0.1" if conv.separable else "0"
                yield f"{ENCODER}.feature_extractor.conv_layers.{i}.{suffix}", density
        if not self.no_prune_post_extract_proj and config.project_features:
            yield f"{ENCODER}.post_extract_proj", density
        if not self.no_prune_pos:
            if config.pos_conv_shape is not None:
                raise ValueError(
                    "`no_prune_pos` must be true where pruning left groups of different sizes in the positional convolution: they have no "
                    "masked form"
                )
            for i in range(config.pos_conv_depth):
                suffix = "" if config.pos_conv_depth == 1 else ".0"
                yield f"{ENCODER}.encoder.pos_conv.{i}{suffix}", density

    def scores_learn(self, name: str) -> bool:
        """Whether the scores of a module learn: not with ``fix_mask``, nor below layer ``fix_mask_before`` (what is in front included)."""
        if self.fix_mask or not self.learns_scores:
            return False
        return self.fix_mask_before == 0 or name == HEAD or layer_of(name) >= self.fix_mask_before

    def takes_scores(self, name: str) -> bool:
        """Whether a start from another checkpoint takes the scores of this module (``load_mask_only``, ``load_mask_before``)."""
        return self.load_mask_before == 0 or (name != HEAD and layer_of(name) < self.load_mask_before)


def layer_of(name: str) -> int:
    """Index of the encoder layer that a module is in; -1 for what is in front of the layers or beside them."""
    words = name.split(".")
    return int(words[words.index("layers") + 1]) if "layers" in words else -1


def _require_density(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(
            f"`{name}` is the kept fraction and must be in (0, 1], but is {value}; 0.9 removes 10% of the connections"
        )


def _require_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, but is {value!r}")
