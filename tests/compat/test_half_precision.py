"""Weights that a model sets to 0 stay 0 in fairseq's half-precision optimizer, which steps on float32 copies of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("fairseq")

from fairseq.optim.fp16_optimizer import FP16Optimizer
from fairseq.tasks import FairseqTask
from omegaconf import OmegaConf

import s3distill  # noqa: F401  installs what is tested
from s3distill.compat.half_precision import multiply_copies

LR = 0.125  # a power of 2, so that steps are exact in bfloat16


class Model(nn.Module):
    """Two weights; what was multiplied in front of an update is in ``factors``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.full((2, 2), 2.0))
        self.factors: dict[nn.Parameter, Tensor] = {}

    def changed_weights(self) -> dict[nn.Parameter, Tensor]:
        return self.factors


def make_optimizer(model: Model) -> FP16Optimizer:
    cfg = OmegaConf.create(
        {
            "common": {"bf16": True, "fp16_no_flatten_grads": True, "fp16_scale_window": 1, "model_parallel_size": 1},
            "optimization": {"update_freq": [1], "lr": [LR]},
            "distributed_training": {"distributed_world_size": 1},
            "optimizer": {"_name": "sgd", "momentum": 0.0, "weight_decay": 0.0, "lr": [LR]},
        }
    )
    return FP16Optimizer.build_optimizer(cfg, [p for p in model.parameters() if p.requires_grad])


def update(model: Model, optimizer: FP16Optimizer) -> None:
    """A task's step in fairseq's trainer; the gradient of every weight is 1."""
    optimizer.zero_grad()
    optimizer.backward(sum(p.sum() for p in model.parameters()))
    FairseqTask.optimizer_step(SimpleNamespace(), optimizer, model=model, update_num=0)


def test_zeroed_weights_step_from_zero() -> None:
    model = Model().bfloat16()
    optimizer = make_optimizer(model)
    update(model, optimizer)
    assert model.first.tolist() == [1 - LR] * 3
    mask = torch.tensor([[True, False], [False, True]])
    with torch.no_grad():
        model.second.mul_(mask)
    model.factors = {model.second: mask}
    update(model, optimizer)
    assert model.second.tolist() == [[2 - 2 * LR, -LR], [-LR, 2 - 2 * LR]]
    assert model.first.tolist() == [1 - 2 * LR] * 3, "other weights are left alone"
    model.factors = {}
    update(model, optimizer)
    assert model.second.tolist() == [[2 - 3 * LR, -2 * LR], [-2 * LR, 2 - 3 * LR]]


def test_without_the_factors_they_would_come_back() -> None:
    """Why this is needed: fairseq's own behaviour."""
    model = Model().bfloat16()
    optimizer = make_optimizer(model)
    with torch.no_grad():
        model.second.zero_()
    update(model, optimizer)
    assert model.second.tolist() == [[2 - LR] * 2] * 2


def test_models_that_change_nothing_step_as_ever() -> None:
    model: Any = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    model(torch.ones(1, 2)).sum().backward()
    before = model.weight.detach().clone()
    FairseqTask.optimizer_step(SimpleNamespace(), optimizer, model=model, update_num=0)
    torch.testing.assert_close(model.weight, before - LR)
    pruned = Model()  # float32: there are no copies
    pruned.factors = {pruned.first: torch.zeros(3)}
    optimizer = torch.optim.SGD(pruned.parameters(), lr=LR)
    FairseqTask.optimizer_step(SimpleNamespace(), optimizer, model=pruned, update_num=0)
    assert pruned.first.tolist() == [1.0] * 3


def test_flat_copies_of_each_device() -> None:
    """The layout of `common.fp16` without ``fp16_no_flatten_grads``: all parameters behind one another."""
    parameters = [nn.Parameter(torch.full(shape, float(i + 1))) for i, shape in enumerate([(3,), (2, 2), (1, 1, 2)])]
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in parameters]))
    optimizer = SimpleNamespace(fp16_params=parameters, fp32_params={None: flat})
    mask = torch.tensor([[True, False], [False, True]])
    multiply_copies(optimizer, {parameters[1]: mask, parameters[2]: torch.tensor([[[0.5, 1.0]]])})
    assert flat.tolist() == [1, 1, 1, 2, 0, 0, 2, 1.5, 3]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_flat_copies_of_the_real_optimizer() -> None:
    model = Model().half().cuda()
    cfg = OmegaConf.create(
        {
            "common": {"fp16": True, "fp16_scale_window": 1, "fp16_init_scale": 4, "fp16_scale_tolerance": 0.0}
            | {"threshold_loss_scale": None, "min_loss_scale": 1e-4, "model_parallel_size": 1},
            "optimization": {"update_freq": [1], "lr": [LR]},
            "distributed_training": {"distributed_world_size": 1},
            "optimizer": {"_name": "sgd", "momentum": 0.0, "weight_decay": 0.0, "lr": [LR]},
        }
    )
    optimizer = FP16Optimizer.build_optimizer(cfg, list(model.parameters()))
    mask = torch.tensor([[True, False], [False, True]]).cuda()
    with torch.no_grad():
        model.second.mul_(mask)
    model.factors = {model.second: mask}
    update(model, optimizer)
    assert model.second.tolist() == [[2 - LR, -LR], [-LR, 2 - LR]]
