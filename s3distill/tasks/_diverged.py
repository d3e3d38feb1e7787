"""A student that diverged is not written over a good one."""

from torch import nn


def require_finite_parameters(model: nn.Module) -> None:
    """Refuses to save a model that holds NaN or infinity (`RuntimeError`)."""
    broken = [name for name, parameter in model.named_parameters() if not bool(parameter.isfinite().all())]
    if broken:
        raise RuntimeError(
            f"the training diverged: {', '.join(broken[:5])} ({len(broken)} parameters in all) hold NaN or infinity, so this "
            "checkpoint is not written and the last one is untouched; lower optimization.lr, optimizer.gate_lr or "
            "optimizer.multiplier_lr"
        )
