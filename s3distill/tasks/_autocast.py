"""Mixed precision in bfloat16 for training: matrix products are rounded, parameters and what must stay exact are not.

fairseq has none: ``common.amp`` means float16, ``common.bf16`` casts the whole model, parameters included.
"""

from collections.abc import Callable
from typing import Any

import torch

from s3distill import kernels

AUTOCAST_DTYPES = ("none", "bfloat16")  # float16 would need the loss to be scaled, which common.amp does

_OTHER_PRECISIONS = ("fp16", "bf16", "amp")


def check_autocast(cfg: Any) -> None:
    """Refuses `task.autocast_dtype` beside fairseq's own reduced precisions.

    Raises:
        ValueError: with the option to change.
    """
    if str(cfg.autocast_dtype) == "none":
        return
    others = [name for name in _OTHER_PRECISIONS if getattr(cfg, name) is True]
    if others:
        given = ", ".join(f"common.{name}=true" for name in others)
        raise ValueError(
            f"`task.autocast_dtype={cfg.autocast_dtype}` keeps parameters in float32 and must be the only reduced precision, but came "
            f"with {given}; pass {' '.join(f'common.{name}=false' for name in others)}, or task.autocast_dtype=none"
        )


class AutocastSteps:
    """Training and validation steps of a task whose ``cfg`` has ``autocast_dtype``; in front of fairseq's task class.

    Only the criterion's call is inside: fairseq's `train_step` sets an autocast of its own around it, and the backward pass
    takes the types of the forward pass by itself.
    """

    cfg: Any
    _first_update: int | None = None  # of this process
    _memory_returned = False

    def train_step(
        self, sample: Any, model: Any, criterion: Any, optimizer: Any, update_num: int, **options: Any
    ) -> Any:
        if not torch.cuda.is_available():
            kernels.keep_freed_memory()
            self._return_memory_once(update_num)
        return super().train_step(sample, model, self._autocast(criterion), optimizer, update_num, **options)  # type: ignore[misc]

    def _return_memory_once(self, update_num: int) -> None:
        """In front of the second update of a process: the optimizer's states are there then."""
        if self._first_update is None:
            self._first_update = update_num
        elif update_num != self._first_update and not self._memory_returned:
            self._memory_returned = True
            kernels.return_freed_memory()

    def valid_step(self, sample: Any, model: Any, criterion: Any, *args: Any, **options: Any) -> Any:
        return super().valid_step(sample, model, self._autocast(criterion), *args, **options)  # type: ignore[misc]

    def _autocast(self, criterion: Any) -> Callable[..., Any]:
        if str(self.cfg.autocast_dtype) == "none":
            return criterion
        dtype = getattr(torch, str(self.cfg.autocast_dtype))

        def with_autocast(model: Any, batch: Any, *args: Any, **options: Any) -> Any:
            device = next(model.parameters()).device.type
            with torch.autocast(device, dtype):
                return criterion(model, batch, *args, **options)

        return with_autocast
