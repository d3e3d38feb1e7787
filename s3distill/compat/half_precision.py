"""The float32 copies of the weights that fairseq's half-precision optimizer keeps: they follow what a model does to its weights.

`FP16Optimizer` (``common.fp16``, ``common.bf16``) steps on copies and writes them over the model. Weights that the model
has set to 0 since would come back with the next update.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def know_changed_weights() -> None:
    """Lets every task's optimizer step see ``model.changed_weights()``: parameter -> what it was multiplied by in this update."""
    from fairseq.tasks import FairseqTask

    stock = FairseqTask.optimizer_step
    if getattr(stock, "is_s3distill", False):
        return

    def optimizer_step(self: Any, optimizer: Any, model: Any, update_num: int) -> None:
        changed = getattr(model, "changed_weights", None)
        if changed is not None:
            multiply_copies(optimizer, changed())
        stock(self, optimizer, model, update_num)

    optimizer_step.is_s3distill = True  # type: ignore[attr-defined]
    FairseqTask.optimizer_step = optimizer_step


@torch.no_grad()
def multiply_copies(optimizer: Any, factors: Mapping[nn.Parameter, Tensor]) -> None:
    """Multiplies the float32 copies of parameters; an optimizer that keeps none is left alone.

    Args:
        optimizer: fairseq's; of `FP16Optimizer` it knows both forms, one flat copy per device and one copy per parameter.
        factors: parameter of the model -> tensor that broadcasts to it.
    """
    copies = getattr(optimizer, "fp32_params", None)
    if not factors or copies is None:
        return
    if isinstance(copies, dict):
        offsets = dict.fromkeys(copies, 0)
        for parameter in optimizer.fp16_params:
            device, size = parameter.device.index, parameter.numel()
            if parameter in factors:
                copy = copies[device].data[offsets[device] : offsets[device] + size]
                copy.view_as(parameter).mul_(factors[parameter])
            offsets[device] += size
        return
    for parameter, copy in zip(optimizer.fp16_params, copies, strict=True):
        if parameter in factors:
            copy.data.mul_(factors[parameter])
