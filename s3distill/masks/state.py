"""Checkpoints of masked networks: what is taken from one when training starts, goes on, or the network is rebuilt."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from s3distill.encoder.checkpoint import ParsedCheckpoint
from s3distill.encoder.model import PARAMETER_PREFIXES
from s3distill.masks.network import MaskedNetwork
from s3distill.masks.options import ENCODER, MaskOptions

logger = logging.getLogger(__name__)

SCORES = ".scores"
_DAMAGED = "its configuration is damaged: take another copy of it"


def adopt_state(network: MaskedNetwork, state: Mapping[str, Tensor], masks_only: bool = False) -> None:
    """Loads a checkpoint's state into a network with masks.

    - A state with scores (a run of this model, or S3-Router's own file): weights and scores, as they are.
    - A state without any (a dense fine-tuned model, the first step of the pruning recipe): its weights, and scores that start
      from them as ``init_score`` says.
    - ``masks_only``: the scores alone, of the modules that `MaskOptions.takes_scores` names; everything else stays.

    Scores of modules that this network does not mask are left out (S3-Router saves them under ``fix_attn`` too).

    Args:
        state: names below the network (``w2v_model....``, ``proj....``).
    Raises:
        ValueError: scores are missing or of another shape, or the weights are of another model.
    """
    options = network.options
    assert options is not None, "add_masks comes first"
    masked = network.masked_modules()
    found = {name.removesuffix(SCORES): value for name, value in state.items() if name.endswith(SCORES)}
    wanted = [name for name in masked if not masks_only or options.takes_scores(name)]
    if masks_only and not wanted:
        raise ValueError(
            f"`load_mask_before`={options.load_mask_before} names no module that is masked; raise it, or set load_mask_only"
        )
    if found or masks_only:
        _check_scores(masked, wanted, found)
    foreign = sorted(set(found) - set(masked))
    if foreign:
        logger.info("scores of %d modules that are not masked here are left out (%s, ...)", len(foreign), foreign[0])
    if masks_only:
        _copy({masked[name].scores: found[name] for name in wanted})
        logger.info("took the scores of %d masks, and nothing else", len(wanted))
        return
    load_weights(network, state)
    if found:
        _copy({masked[name].scores: found[name] for name in wanted})
    else:
        network.reset_scores()
        start = options.init_score if options.learns_scores else options.prune_method
        logger.info("scores of %d masks start from the loaded weights: %s", len(masked), start)


def _check_scores(masked: Mapping[str, object], wanted: list[str], found: Mapping[str, Tensor]) -> None:
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ValueError(
            f"the checkpoint must have scores for every masked module, but has none for {', '.join(missing[:4])} ({len(missing)} of "
            f"{len(wanted)}); mask the modules that it masks (fix_attn, fix_fc, no_prune_*), or start from a checkpoint with masks"
        )
    for name in wanted:
        scores, expected = found[name], tuple(masked[name].scores.shape)  # type: ignore[attr-defined]
        if not isinstance(scores, Tensor) or not scores.is_floating_point():
            came = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(
                f"the scores of {name} must be a tensor of floats, but are {came}; take another copy of the checkpoint"
            )
        shape = tuple(scores.shape)
        if shape != expected:
            raise ValueError(
                f"the scores of {name} must have the shape {expected}, but the checkpoint has {shape}; was it trained with another "
                "mask_pattern or linear_st_op, or over another backbone?"
            )
        if bool(scores.isnan().any()):
            raise ValueError(
                f"the scores of {name} must be numbers, but hold NaN: the training that wrote them diverged; take an earlier checkpoint"
            )


def load_weights(network: MaskedNetwork, state: Mapping[str, Tensor]) -> None:
    """Everything but scores, by name; all must be there and fit."""
    own = {name: p for name, p in network.state_dict(keep_vars=True).items() if not name.endswith(SCORES)}
    known = tuple(f"{ENCODER}.{prefix}" for prefix in PARAMETER_PREFIXES)
    given = {
        name: value
        for name, value in state.items()
        # pre-training leftovers of fairseq's fine-tuned models, such as HuBERT's label embeddings, are nothing to this one
        if not name.endswith(SCORES) and (name.startswith(known) or not name.startswith(f"{ENCODER}."))
    }
    missing, unexpected = sorted(set(own) - set(given)), sorted(set(given) - set(own))
    wrong = [
        f"{name}: {tuple(given[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in given and given[name].shape != own[name].shape
    ]
    if missing or unexpected or wrong:
        raise ValueError(
            f"the checkpoint is not of this backbone and head; missing: {missing[:3] or 'none'}, unexpected: "
            f"{unexpected[:3] or 'none'}, of another shape: {wrong[:3] or 'none'} ({len(missing)}, {len(unexpected)} and {len(wrong)} "
            "in all). A fine-tuned model must come from the same model.w2v_path and dictionary"
        )
    broken = [name for name in own if not bool(given[name].isfinite().all())]
    if broken:
        raise ValueError(
            f"the checkpoint's weights must be finite, but {', '.join(broken[:3])} ({len(broken)} in all) hold NaN or infinity: the "
            "training that wrote it diverged; take an earlier checkpoint"
        )
    _copy({parameter: given[name] for name, parameter in own.items()})


@torch.no_grad()
def _copy(values: Mapping[Tensor, Tensor]) -> None:
    for target, value in values.items():
        target.copy_(value)


def read_masks(checkpoint: ParsedCheckpoint, name: str = "the checkpoint") -> dict[str, Tensor]:
    """The binary masks of a trained checkpoint: module -> bool of the weight's shape; empty for a dense one.

    Args:
        name: what messages call the file.
    Raises:
        ValueError: the scores do not fit the options that the checkpoint carries.
    """
    if not checkpoint.scores:
        return {}
    network = network_of(checkpoint, name)
    return {module_name: module.mask() for module_name, module in network.masked_modules().items()}


def network_of(checkpoint: ParsedCheckpoint, name: str = "the checkpoint") -> MaskedNetwork:
    """Rebuilds the network of a trained checkpoint, masks included, in evaluation mode.

    Args:
        name: what messages call the file.
    Raises:
        ValueError: it has no head, its options are damaged, or its tensors do not fit them.
    """
    if checkpoint.head_state is None:
        raise ValueError(f"{name} has no head (w2v_encoder.proj); masks are trained with one")
    try:
        return _network_of(checkpoint, checkpoint.head_state)
    except ValueError as error:
        raise ValueError(
            f"the {'masks' if checkpoint.scores else 'weights'} of {name} cannot be read: {error}"
        ) from error


def _network_of(checkpoint: ParsedCheckpoint, head_state: Mapping[str, Tensor]) -> MaskedNetwork:
    if head_state["weight"].dim() != 2:
        raise ValueError(
            f"the head's weight must be [outputs, width], but has the shape {tuple(head_state['weight'].shape)}"
        )
    network = MaskedNetwork(checkpoint.config, len(head_state["weight"]), pool=checkpoint.pooled)
    if checkpoint.scores:
        network.add_masks(_options_of(checkpoint))
    state = {f"{ENCODER}.{name}": value for name, value in checkpoint.encoder_state.items()}
    state |= {f"proj.{name}": value for name, value in head_state.items()}
    state |= {f"{name}{SCORES}": value for name, value in checkpoint.scores.items()}
    if checkpoint.scores:
        adopt_state(network, state)
    else:
        load_weights(network, state)
    return network.eval()


def _options_of(checkpoint: ParsedCheckpoint) -> MaskOptions:
    """The options of its masks. Whatever made the scores, the mask is their top-k."""
    options = checkpoint.model_options
    for option in ("prune_rate", "init_score_scale", "fix_mask_before", "load_mask_before"):
        if option in options and not isinstance(options[option], int | float):
            raise ValueError(f"`{option}` must be a number, but is {options[option]!r}; {_DAMAGED}")
    for option in ("layerwise_prune_rate", "fc_attn_prune_rate"):
        values = options.get(option)
        is_list = isinstance(values, Sequence) and all(isinstance(value, int | float) for value in values)
        if values is not None and not is_list:
            raise ValueError(f"`{option}` must be a list of numbers, or null, but is {values!r}; {_DAMAGED}")
    method = {"init_score": "zero", "prune_method": "s3_router", "prune_interval": None, "prune_steps": None}
    return MaskOptions.from_mapping({**options, **method})


def baked(checkpoint: ParsedCheckpoint, name: str = "the checkpoint") -> ParsedCheckpoint:
    """The dense model that a masked checkpoint stands for, weights in float32; one without masks comes back as it is.

    Args:
        name: what messages call the file.
    Raises:
        ValueError: see `network_of`.
    """
    if not checkpoint.scores:
        return checkpoint
    network = network_of(checkpoint, name)
    network.bake()
    encoder, head = dict(network.w2v_model.state_dict()), dict(network.proj.state_dict())
    return dataclasses.replace(checkpoint, encoder_state=encoder, head_state=head, scores={})
