"""The size constraint of a gated student, as criterions see it: where it is to be, and what is logged of it."""

from typing import Any, Optional

from torch import Tensor

from s3distill.criterions._distill_checks import target_of
from s3distill.gates.lagrangian import target_at


def check_size_options(cfg: Any) -> None:
    """Refuses `SizeOptions` that are out of range (`ValueError`)."""
    if not 0 <= cfg.target_sparsity < 1:
        raise ValueError(
            f"`criterion.target_sparsity` must be in [0, 1), but is {cfg.target_sparsity}; 0.75 removes 75%"
        )
    if cfg.sparsity_warmup < 0:
        raise ValueError(
            f"`criterion.sparsity_warmup` counts updates and must be at least 0, but is {cfg.sparsity_warmup}"
        )


def target_at_update(model: Any, cfg: Any, num_frozen: int = 0) -> Optional[float]:
    """Target sparsity at this update, or None without gates.

    Args:
        model: a student, with `StudentParts`.
        cfg: `SizeOptions`.
        num_frozen: updates at the start in which the encoder does not learn; the constraint waits for them.
    """
    if model.gates is None or (model.training and model.num_updates < num_frozen):
        return None
    target = target_of(model, cfg.target_sparsity, cfg.target_rtf)
    start = min(model.initial_sparsity, target)
    return target_at(max(model.num_updates - num_frozen, 0), target, cfg.sparsity_warmup, start)


def size_log(model: Any, out: Any, target_sparsity: Optional[float], num_frames: int) -> dict[str, Any]:
    """Constraint and gates; weighted by frames, so that sums over batches and ranks average them."""
    values = {
        "penalty": out["penalty"].detach(),
        "expected_sparsity": out["expected_sparsity"].detach(),
        "target_sparsity": float(target_sparsity or 0.0),
        **({"expected_rtf": _expected_rtf(model, out)} if str(model.cfg.prune_measure) == "latency" else {}),
        "lambda1": model.lagrangian.lambda1.detach(),
        "lambda2": model.lagrangian.lambda2.detach(),
    }
    values |= {
        f"kept_{unit}_{layer}": float(count)
        for unit, counts in model.gates.kept_counts().as_dict().items()
        if unit in model.gates.units
        for layer, count in enumerate(counts)
    }
    return {f"size_{name}": value * num_frames for name, value in values.items()}


def _expected_rtf(model: Any, out: Any) -> Tensor:
    return (1 - out["expected_sparsity"].detach()) * model.cfg.reference_cost  # type: ignore[no-any-return]
