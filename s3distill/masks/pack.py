"""From a trained run to a bank entry, and from masks and weights to the dense model that they stand for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from s3distill.encoder.checkpoint import ParsedCheckpoint
from s3distill.masks.bank import WEIGHTS_DTYPES, BankEntry
from s3distill.masks.options import ENCODER, HEAD, MaskOptions
from s3distill.masks.state import read_masks

_PATTERN = ("mask_pattern", "linear_st_op")  # the options that decide on it
_WEIGHTS = ("weight", "weight_g", "weight_v")  # what a mask lies over; a weight-normed convolution has the last two


def pack_run(
    run: ParsedCheckpoint,
    backbone: ParsedCheckpoint,
    name: str,
    info: Mapping[str, Any] | None = None,
    run_name: str = "the run",
    backbone_name: str = "the backbone",
) -> BankEntry:
    """What a run of `wav2vec_ctc_st` adds to its backbone: masks, head, and the tensors that it trained beside them.

    Args:
        info: more for `BankEntry.info`; density, pattern, normalize, kind and weights_dtype are read from the run.
        run_name, backbone_name: what messages call the files.
    Raises:
        ValueError: the run has no masks, or its masked weights are not the backbone's (it trained them, or it is of another
            backbone): a mask alone cannot give that model.
    """
    if any("gates." in key for key in run.extra_state):
        raise ValueError(
            f"{run_name} cannot be packed: it has gates beside its masks, and a pruned encoder has another backbone; cut both into a "
            "compact model: s3distill prune RUN compact.pt"
        )
    masks = read_masks(run, run_name)
    if not masks:
        raise ValueError(
            f"{run_name} cannot be packed: it must be a run of wav2vec_ctc_st, whose masks lie over a shared backbone, but it has no masks "
            f"(model {run.model_name!r}); a dense model stands by itself"
        )
    dtype, tensors = trained_tensors(run, backbone, masks, run_name, backbone_name)
    _refuse_trained_weights(tensors, masks, run_name, backbone_name)
    kept, total = sum(int(m.sum()) for m in masks.values()), sum(m.numel() for m in masks.values())
    facts = {
        "kind": kind_of(run),
        "density": round(kept / total, 6),
        "pattern": MaskOptions.from_mapping({k: v for k, v in run.model_options.items() if k in _PATTERN}).pattern,
        "normalize": run.normalize,
        "weights_dtype": dtype,
    }
    return BankEntry(name, masks, tensors, run.symbols, facts | dict(info or {}))


def kind_of(run: ParsedCheckpoint) -> str:
    """What the head is for: ``classification`` (one output per utterance) or ``ctc`` (one per frame)."""
    return "classification" if run.pooled else "ctc"


def trained_tensors(
    run: ParsedCheckpoint,
    backbone: ParsedCheckpoint,
    masked: Iterable[str],
    run_name: str = "the run",
    backbone_name: str = "the backbone",
) -> tuple[str, dict[str, Tensor]]:
    """What has to be stored of a run beside its masks and the backbone.

    A run in half precision rounds the backbone, and fairseq's trainer saves it as float32 all the same (`utils.move_to_cpu`). So
    the values decide: its type is the first of `WEIGHTS_DTYPES` under which fewest masked weights differ from the backbone's
    (none, or the run has trained them), and of those fewest tensors.

    Args:
        masked: names of the masked modules.
        run_name, backbone_name: what messages call the files.
    Returns:
        That type, and by full name the head and the encoder's tensors that differ from the rounded backbone's, in that type
        where it holds their values exactly.
    Raises:
        ValueError: the encoder is another.
    """
    _refuse_another_encoder(run, backbone, run_name, backbone_name)
    weights = {key for module in masked for key in _weights_of(module)}
    changed = {dtype: _changed(run, backbone, getattr(torch, dtype)) for dtype in WEIGHTS_DTYPES}
    dtype = min(changed, key=lambda d: (len(weights & set(changed[d])), len(changed[d])))
    trained = {f"{ENCODER}.{key}": run.encoder_state[key] for key in changed[dtype]}
    trained |= {f"{HEAD}.{key}": value for key, value in (run.head_state or {}).items()}
    return dtype, {name: _as_trained(tensor, getattr(torch, dtype)) for name, tensor in trained.items()}


def _changed(run: ParsedCheckpoint, backbone: ParsedCheckpoint, rounding: torch.dtype) -> list[str]:
    """Names of the run's encoder tensors that are not the backbone's after rounding."""
    base = backbone.encoder_state
    return [
        key
        for key, value in run.encoder_state.items()
        if not torch.equal(base[key].to(rounding).float(), value.float())
    ]


def _as_trained(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = tensor.to(dtype)
    smaller = rounded.element_size() < tensor.element_size()
    return rounded if smaller and torch.equal(rounded.float(), tensor.float()) else tensor


def _weights_of(module: str) -> set[str]:
    """Names in the encoder's state that a mask over this module may lie over."""
    return {f"{module.removeprefix(f'{ENCODER}.')}.{weight}" for weight in _WEIGHTS}


def _refuse_another_encoder(
    run: ParsedCheckpoint, backbone: ParsedCheckpoint, run_name: str, backbone_name: str
) -> None:
    own, base = run.encoder_state, backbone.encoder_state
    foreign = sorted(set(own) ^ set(base)) or sorted(key for key in own if own[key].shape != base[key].shape)
    if foreign:
        raise ValueError(
            f"{run_name} must have the encoder of {backbone_name}, but {len(foreign)} tensors are not in both, or of another shape "
            f"({', '.join(foreign[:3])}); pass the checkpoint that the run had as model.w2v_path with --backbone"
        )


def _refuse_trained_weights(
    tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor], run_name: str, backbone_name: str
) -> None:
    modules = [m for m in masks if m != HEAD]
    changed = {name.removeprefix(f"{ENCODER}.") for name in tensors}
    trained = [m for m in modules if _weights_of(m) & changed]
    if trained:
        raise ValueError(
            f"{run_name} cannot be packed: masks mean W * mask over the backbone's own weights, but the weights of {len(trained)} of its "
            f"{len(modules)} masked modules ({', '.join(trained[:3])}) are not those of {backbone_name}. If the run began from another "
            "checkpoint, pass that with --backbone; if it trained these weights (co_train, trainable_*, prune_method), make a dense "
            "model of it: s3distill masks bake RUN OUT"
        )


def entry_state(backbone: ParsedCheckpoint, entry: BankEntry) -> dict[str, Tensor]:
    """The weights under an entry's masks: the backbone's, rounded as in the run, and what the run trained; by full name."""
    rounding = getattr(torch, entry.info.get("weights_dtype", "float32"))
    rounded = {f"{ENCODER}.{key}": value.to(rounding) for key, value in backbone.encoder_state.items()}
    return {key: value.float() for key, value in (rounded | entry.tensors).items()}


def dense_state(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Multiplies masks into weights.

    A weight-normed convolution is written as v = W * mask with g = ||v||, which gives W * mask back to about 1e-7 of it;
    everything else is exact.

    Args:
        weights: by full name (``w2v_model.encoder.layers.0.fc1.weight``, ..., ``proj.bias``).
        masks: module -> bool of its weight's shape.
    Returns:
        The same names, float32.
    Raises:
        ValueError: a mask lies over a module that has no weight here.
    """
    state = {name: tensor.float() for name, tensor in weights.items()}
    for module, mask in masks.items():
        if f"{module}.weight" in state:
            state[f"{module}.weight"] = state[f"{module}.weight"] * mask
        elif f"{module}.weight_v" in state:
            names = f"{module}.weight_v", f"{module}.weight_g"
            weight = torch._weight_norm(state[names[0]], state[names[1]], 2) * mask
            norm = weight.norm(dim=(0, 1), keepdim=True)
            # a kernel position with nothing left has g = 0 and any direction but 0 / 0
            state[names[0]], state[names[1]] = torch.where(norm > 0, weight, torch.ones_like(weight)), norm
        else:
            raise ValueError(f"a mask must lie over a weight, but the model has no {module}.weight")
    return state
