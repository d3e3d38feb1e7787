"""What fine-tuned models share: encoder and head behind fairseq's interface, and how they are built."""

# no `from __future__ import annotations`: used by files whose config fields fairseq reads
import logging
from dataclasses import fields
from typing import Any, Dict, Optional, Tuple

from fairseq.models import BaseFairseqModel
from torch import Tensor

from s3distill import compat
from s3distill.encoder.config import EncoderConfig
from s3distill.encoder.model import EncoderOutput
from s3distill.encoder.training_config import MaskConfig, TrainingConfig
from s3distill.masks.modules import kept_share
from s3distill.masks.network import MaskedNetwork, check_something_learns, trained_names
from s3distill.masks.options import HEAD, MaskOptions
from s3distill.masks.state import SCORES, adopt_state
from s3distill.models._backbone import Backbone, read_backbone

logger = logging.getLogger(__name__)

# options that fairseq's own fine-tuned models read, with their defaults
_WITHOUT_EFFECT = {
    **{"freeze_regex": None, "load_ema": False, "layer_decay": 1, "zero_mask": False, "offload_activations": False},
    **{"drop_path": 0, "layer_type": "transformer", "adp_num": -1},
}


class FineTunedEncoder(MaskedNetwork):
    """`MaskedNetwork` built from fairseq's fine-tuning options, with fairseq's output.

    Args:
        num_outputs: symbols of the dictionary, or classes.
        extractor_learns: let gradients into the conv extractor even where ``feature_grad_mult`` is 0.
    """

    def __init__(
        self, cfg: Any, config: EncoderConfig, num_outputs: int, extractor_learns: bool = False, pool: bool = False
    ) -> None:
        training = TrainingConfig(
            dropout=cfg.dropout,
            attention_dropout=cfg.attention_dropout,
            activation_dropout=cfg.activation_dropout,
            dropout_input=cfg.dropout_input,
            layerdrop=cfg.layerdrop,
            feature_grad_mult=cfg.feature_grad_mult or float(extractor_learns),
            checkpoint_activations=cfg.checkpoint_activations,
        )
        names = {f.name for f in fields(MaskConfig)}
        masking = MaskConfig(**{name: getattr(cfg, name) for name in names if hasattr(cfg, name)})
        super().__init__(config, num_outputs, training, masking, pool, cfg.final_dropout)
        self.apply_mask = cfg.apply_mask
        self.freeze_finetune_updates, self.num_updates = cfg.freeze_finetune_updates, 0

    @property
    def is_frozen(self) -> bool:
        """Whether the head alone learns at this update (``freeze_finetune_updates``)."""
        return self.training and self.num_updates < self.freeze_finetune_updates

    def encode(
        self, source: Tensor, padding_mask: Optional[Tensor], **options: Any
    ) -> Tuple[Dict[str, Any], EncoderOutput]:
        """What `run` gives, and the encoder's output; ``options`` are `MaskedNetwork.forward`'s."""
        if self.training:
            self.prune(self.num_updates)
        mask = self.apply_mask and self.training
        logits, out = self(source, padding_mask, mask=mask, frozen_encoder=self.is_frozen, **options)
        return self._as_fairseq(logits, out), out

    def run(self, source: Tensor, padding_mask: Optional[Tensor]) -> Dict[str, Any]:
        """[B, S] -> ``encoder_out`` [T, B, V] (with pooling [B, V]), ``padding_mask`` [B, T] or None, ``layer_results``."""
        return self.encode(source, padding_mask)[0]

    def _as_fairseq(self, logits: Tensor, out: EncoderOutput) -> Dict[str, Any]:
        return {
            "encoder_out": logits if self.pool else logits.transpose(0, 1),
            "padding_mask": out.padding_mask,
            "layer_results": [(h.transpose(0, 1), None) for h in out.hidden_states[1:]],
        }

    def reorder_encoder_out(self, encoder_out: Dict[str, Any], new_order: Tensor) -> Dict[str, Any]:
        """fairseq's beam search reorders the batch."""
        reordered = dict(encoder_out)
        reordered["encoder_out"] = encoder_out["encoder_out"].index_select(0 if self.pool else 1, new_order)
        if encoder_out["padding_mask"] is not None:
            reordered["padding_mask"] = encoder_out["padding_mask"].index_select(0, new_order)
        return reordered


class MaskedFairseqModel(BaseFairseqModel):
    """What fairseq calls of a model with masks, whatever its head is for; its keys are S3-Router's (``w2v_encoder.….scores``)."""

    def __init__(self, cfg: Any, w2v_encoder: FineTunedEncoder) -> None:
        super().__init__()
        self.cfg = cfg
        self.w2v_encoder = w2v_encoder

    def forward(self, source: Tensor, padding_mask: Optional[Tensor] = None, **_: Any) -> Dict[str, Any]:
        """[B, S] -> ``encoder_out`` [T, B, V] (logits; with pooling [B, V]), ``padding_mask`` [B, T] or None, ``layer_results``."""
        return self.w2v_encoder.run(source, padding_mask)

    def load_state_dict(self, state_dict: Any, strict: bool = True, model_cfg: Any = None, args: Any = None) -> Any:
        """Takes a run of this model whole; from a new run's start (``finetune_from_model``) what ``load_mask_*`` leave."""
        own = {k.removeprefix("w2v_encoder."): v for k, v in state_dict.items() if k.startswith("w2v_encoder.")}
        options = self.w2v_encoder.options
        assert options is not None
        if not options.learns_scores and compat.starts_from_another_run() and any(k.endswith(".scores") for k in own):
            raise ValueError(
                f"prune_method={options.prune_method} starts from a dense model, but checkpoint.finetune_from_model has masks; pass a "
                "model that was fine-tuned with model._name=wav2vec_ctc"
            )
        masks_only = (options.load_mask_only or options.load_mask_before > 0) and compat.starts_from_another_run()
        adopt_state(self.w2v_encoder, own, masks_only)

    def set_num_updates(self, num_updates: int) -> None:
        super().set_num_updates(num_updates)
        self.w2v_encoder.num_updates = num_updates

    @property
    def num_updates(self) -> int:
        return self.w2v_encoder.num_updates

    def changed_weights(self) -> Dict[Any, Tensor]:
        """What pruning multiplied weights by in front of this update: copies that an optimizer keeps must follow."""
        magnitude = self.w2v_encoder.magnitude
        return {} if magnitude is None else magnitude.factors

    def prepare_for_inference_(self, cfg: Any) -> None:
        """`fairseq-generate` calls this: masks are multiplied in, decoding costs what a dense model costs."""
        self.w2v_encoder.bake()
        super().prepare_for_inference_(cfg)  # which alone puts the model in evaluation mode


def build_masked(cfg: Any, num_outputs: int, pool: bool = False) -> FineTunedEncoder:
    """Options, backbone, head, masks; what was read goes into ``cfg.w2v_args``, so that checkpoints rebuild alone."""
    rebuilds = cfg.w2v_args is not None  # from a checkpoint, which may have been trained with what is refused below
    if not rebuilds:
        check_without_effect(cfg)
    options = mask_options(cfg)
    backbone = read_backbone(cfg)
    if not rebuilds:
        options.check_start(backbone.config.num_layers)
    return build_network(cfg, backbone, num_outputs, options, pool)


def mask_options(cfg: Any) -> MaskOptions:
    """The options of S3-Router among a model's."""
    return MaskOptions.from_mapping(vars(cfg) if not hasattr(cfg, "items") else cfg)


def build_network(
    cfg: Any, backbone: Backbone, num_outputs: int, options: Optional[MaskOptions], pool: bool = False
) -> FineTunedEncoder:
    """Encoder and head with the weights of the backbone, and masks over them; ``options`` None: no masks, everything learns."""
    through_extractor = options is not None and extractor_learns(cfg, options)
    network = FineTunedEncoder(cfg, backbone.config, num_outputs, through_extractor, pool)
    if backbone.encoder_state is not None:
        network.w2v_model.load_encoder_state(backbone.encoder_state, backbone.path)
    if backbone.head_state is not None:
        network.proj.load_state_dict(backbone.head_state)
    if options is None:
        return network
    network.add_masks(options)
    if not cfg.feature_grad_mult and through_extractor:  # gradients pass for the scores alone
        for name, parameter in network.w2v_model.feature_extractor.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name.endswith(SCORES))
    if not cfg.eval_only:
        check_something_learns(network, options)
        _check_head_learns(cfg.freeze_finetune_updates, network)
        # an interpolation where there is no whole configuration around the model's
        options.schedule().check_length(cfg.max_update if isinstance(cfg.max_update, int) else 0)
    _report(network, options)
    return network


def check_without_effect(cfg: Any) -> None:
    """Refuses options of stock `wav2vec_ctc` that this encoder has nothing for."""
    for name, default in _WITHOUT_EFFECT.items():
        value = getattr(cfg, name, default)
        if value is not None and value != default:
            raise ValueError(
                f"`model.{name}` has no effect on a model with masks and must stay {default}, but is {value!r}; leave it out"
            )


def _check_head_learns(num_updates: int, network: MaskedNetwork) -> None:
    """While ``freeze_finetune_updates`` freezes the encoder, the head is all that could have a gradient."""
    if num_updates > 0 and not any(name.startswith(f"{HEAD}.") for name in trained_names(network)):
        raise ValueError(
            f"`freeze_finetune_updates`={num_updates} lets the head alone learn at first, but the head is frozen; pass "
            "model.freeze_finetune_updates=0, or model.trainable_proj=true"
        )


def extractor_learns(cfg: Any, options: MaskOptions) -> bool:
    """Whether the conv extractor's scores learn; fairseq's recipes say feature_grad_mult=0, which freezes its weights only."""
    return (
        not options.no_prune_extractor
        and options.learns_scores
        and not options.fix_mask
        and options.fix_mask_before == 0
    )


def _report(network: MaskedNetwork, options: MaskOptions) -> None:
    masked = network.masked_modules()
    num_scores = sum(m.scores.numel() for m in masked.values())
    num_other = sum(p.numel() for n, p in network.named_parameters() if p.requires_grad and not n.endswith(".scores"))
    logger.info(
        "%d masks (%s) with %s scores keep %.2f%% of their connections; other parameters that learn: %s",
        *(len(masked), options.pattern, f"{num_scores:,}", 100 * kept_share(iter(masked.items())), f"{num_other:,}"),
    )
