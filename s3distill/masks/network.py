"""The network that S3-Router trains: a frozen encoder with masks over its weights, and a head."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn

from s3distill.encoder.config import EncoderConfig
from s3distill.encoder.dropout import dropout
from s3distill.encoder.model import EncoderOutput, SpeechEncoder
from s3distill.encoder.training_config import MaskConfig, TrainingConfig
from s3distill.gates.values import GateValues
from s3distill.masks.magnitude import MagnitudePruning
from s3distill.masks.modules import Masked, bake, mask_module, masked_modules
from s3distill.masks.options import ENCODER, HEAD, MaskOptions

logger = logging.getLogger(__name__)

MASK_EMBEDDING = f"{ENCODER}.mask_emb"


class MaskedNetwork(nn.Module):
    """Encoder and head under fairseq's names (``w2v_model``, ``proj``), with masks once `add_masks` was called.

    Args:
        config: shape of the encoder.
        num_outputs: symbols or classes of the head.
        pool: average over the valid frames in front of the head, for one label per utterance.
        final_dropout: dropout in front of the head.
    """

    def __init__(
        self,
        config: EncoderConfig,
        num_outputs: int,
        training: TrainingConfig | None = None,
        masking: MaskConfig | None = None,
        pool: bool = False,
        final_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.w2v_model = SpeechEncoder(config, training, masking)
        self.proj = nn.Linear(config.output_dim, num_outputs)
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)
        self.pool, self.final_dropout = pool, final_dropout
        self.options: MaskOptions | None = None
        self.magnitude: MagnitudePruning | None = None

    def add_masks(self, options: MaskOptions) -> None:
        """Masks the modules that ``options`` name, starts their scores from the present weights and freezes what does not learn."""
        for name, rule in options.rules(self.w2v_model.config).items():
            mask_module(self, name, rule)
        self.options = options
        if not options.learns_scores:
            self.magnitude = MagnitudePruning(self.masked_modules(), options.schedule(), options.prune_method == "parp")
        self.reset_scores()
        choose_trainable(self, options)

    def masked_modules(self) -> dict[str, Masked]:
        """Masked modules by name (``w2v_model.encoder.layers.0.fc1``, ..., ``proj``)."""
        return dict(masked_modules(self))

    def reset_scores(self) -> None:
        """Starts the scores of all masked modules anew from the weights as they are.

        Noise depends on torch's seed and the module's name alone: the ranks of a distributed run start with the same masks.
        """
        assert self.options is not None
        if self.magnitude is not None:
            self.magnitude.start()
            return
        for name, module in self.masked_modules().items():
            generator = torch.Generator().manual_seed(torch.initial_seed() % 2**32 + zlib.crc32(name.encode()))
            module.reset_scores(self.options.init_score, self.options.init_score_scale, generator)

    def forward(
        self,
        source: Tensor,
        padding_mask: Tensor | None = None,
        mask: bool = False,
        frozen_encoder: bool = False,
        gates: GateValues | None = None,
        masked: Tensor | None = None,
        conv_features: Tensor | None = None,
    ) -> tuple[Tensor, EncoderOutput]:
        """Waveforms to logits.

        Args:
            source: [B, S], 16 kHz.
            padding_mask: [B, S], True = padding, or None.
            mask: apply SpecAugment's masks.
            frozen_encoder: no gradient below the head.
            gates, masked, conv_features: of `SpeechEncoder.forward`.
        Returns:
            Logits [B, T, V], with ``pool`` [B, V], and what the encoder gave.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen_encoder):
            out = self.w2v_model(
                source, padding_mask, mask=mask, gates=gates, masked=masked, conv_features=conv_features
            )
        x = mean_over_frames(out.x, out.padding_mask) if self.pool else out.x
        return self.proj(dropout(x, self.final_dropout, self.training)), out

    def prune(self, num_updates: int) -> None:
        """In front of each training forward: what `MagnitudePruning` has to do after ``num_updates`` updates, if it is used."""
        if self.magnitude is not None:
            self.magnitude.prune(num_updates)

    def train(self, mode: bool = True) -> Self:
        changes = mode != self.training
        super().train(mode)
        if changes and self.magnitude is not None:
            self.magnitude.show(mode)
        return self

    def state_dict(self, *values: Any, **options: Any) -> Any:
        if self.magnitude is not None:
            self.magnitude.refresh()
        return super().state_dict(*values, **options)

    def bake(self) -> int:
        """Multiplies the masks into the weights, see `modules.bake`; returns the number of masks."""
        if self.magnitude is not None:
            self.magnitude.show(training=False)
            self.magnitude = None
        return bake(self)


def mean_over_frames(x: Tensor, padding_mask: Tensor | None) -> Tensor:
    """[B, T, C] -> [B, C], the mean over valid frames."""
    if padding_mask is None:
        return x.mean(1)
    valid = (~padding_mask).to(x.dtype)
    return torch.einsum("btc,bt->bc", x, valid) / valid.sum(1, keepdim=True)


def choose_trainable(network: MaskedNetwork, options: MaskOptions) -> None:
    """Freezes every parameter but the scores, `mask_emb` and what the ``trainable_*`` options, ``co_train`` and ``prune_method`` keep.

    Modules are matched by their exact place, so ``trainable_proj`` means the head and not the attention's projections.
    """
    masked = network.masked_modules()
    network.requires_grad_(options.weights_learn)
    network.w2v_model.mask_emb.requires_grad_(True)
    for name, module in network.named_modules():
        if _stays_trainable(name, name in masked, options):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(True)
        bias = getattr(module, "bias", None)
        if options.trainable_bias and isinstance(bias, nn.Parameter):
            bias.requires_grad_(True)
    for name, module in masked.items():
        module.scores.requires_grad_(options.scores_learn(name))


def _stays_trainable(name: str, masked: bool, options: MaskOptions) -> bool:
    return (
        (options.trainable_proj and name == HEAD)
        or (options.trainable_post_extract_proj and name == f"{ENCODER}.post_extract_proj")
        or (options.trainable_pos and name.startswith(f"{ENCODER}.encoder.pos_conv"))
        or (options.trainable_layer_norm and name.endswith("layer_norm"))
        # the encoder itself owns only mask_emb
        or (options.trainable_if_unpruned and not masked)
    )


def trained_names(network: nn.Module) -> Iterator[str]:
    """Names of the parameters that learn, `mask_emb` left out (it learns always, and nothing can be learned by it alone)."""
    for name, parameter in network.named_parameters():
        if parameter.requires_grad and name != MASK_EMBEDDING:
            yield name


def check_something_learns(network: MaskedNetwork, options: MaskOptions) -> None:
    """Refuses options under which nothing learns (`ValueError`)."""
    if any(True for _ in trained_names(network)):
        return
    if not network.masked_modules():
        raise ValueError(
            "nothing would be trained: no module is masked (prune_rate=1, or fix_attn and fix_fc with every no_prune_* set) and no "
            "trainable_* option is set; set model.fix_attn=false or model.fix_fc=false, or e.g. model.trainable_proj=true"
        )
    raise ValueError(
        f"nothing would be trained: the scores of all {len(network.masked_modules())} masks are fixed (fix_mask={options.fix_mask}, "
        f"fix_mask_before={options.fix_mask_before}) and no trainable_* option is set; set one of them, co_train=true, or eval_only=true"
    )
