"""What the tasks do around fairseq's training step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from s3distill import kernels
from s3distill.tasks._autocast import AutocastSteps


class Base:
    """fairseq's task, as far as it counts here."""

    class cfg:
        autocast_dtype = "none"

    def train_step(
        self, sample: Any, model: Any, criterion: Any, optimizer: Any, update_num: int, ignore_grad: bool = False
    ) -> tuple[Any, ...]:
        return sample, model, criterion, optimizer, update_num, ignore_grad


class Task(AutocastSteps, Base):
    pass


@pytest.mark.parametrize("has_gpu", [False, True])
def test_memory_is_returned_once_after_the_first_update(has_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this process, which may have resumed at any update; two batches of an update are one."""
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(kernels, "keep_freed_memory", lambda: calls.append("keep"))
    monkeypatch.setattr(kernels, "return_freed_memory", lambda: calls.append("return"))
    task = Task()
    for update_num in (7, 7, 8, 8, 9):
        arguments = {"sample": "s", "model": "m", "criterion": "c", "optimizer": "o", "update_num": update_num}
        assert task.train_step(**arguments, ignore_grad=True) == (*arguments.values(), True)
    assert calls == ([] if has_gpu else ["keep", "keep", "keep", "return", "keep", "keep"])
    assert task.train_step("s", "m", "c", "o", 10)[-2:] == (10, False)
