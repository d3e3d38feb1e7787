"""Criterions in distributed training that have something to save and nothing that learns."""

from __future__ import annotations

from typing import Any


def know_criterions_that_do_not_learn() -> None:
    """fairseq wraps every criterion that has a parameter in torch's DistributedDataParallel, which refuses one without gradients."""
    from fairseq.trainer import Trainer

    stock = Trainer.criterion.fget

    def criterion(self: Any) -> Any:
        if self._wrapped_criterion is None and not any(p.requires_grad for p in self._criterion.parameters()):
            self._wrapped_criterion = self._criterion
        return stock(self)

    Trainer.criterion = property(criterion)
