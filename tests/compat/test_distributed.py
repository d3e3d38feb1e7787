"""Criterions behind fairseq's wrapper for distributed training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("fairseq")

from fairseq.distributed import ModuleProxyWrapper
from fairseq.trainer import Trainer
from omegaconf import OmegaConf

from s3distill.criterions._confidence import Confidence, ConfidenceOptions

OPTIONS = {
    **{"device_id": None, "broadcast_buffers": False, "bucket_cap_mb": 25},
    **{"find_unused_parameters": False, "gradient_as_bucket_view": False, "ddp_comm_hook": "none"},
    **{"heartbeat_timeout": -1, "tpu": False},
}


@pytest.fixture
def group(tmp_path: Path) -> Any:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def criterion_of(criterion: nn.Module, group: Any, backend: str = "pytorch_ddp") -> Any:
    """What a trainer with several ranks calls."""
    trainer: Any = SimpleNamespace(
        **{"_criterion": criterion, "_wrapped_criterion": None, "use_distributed_wrapper": True},
        cfg=SimpleNamespace(distributed_training=OmegaConf.create({**OPTIONS, "ddp_backend": backend})),
        **{"data_parallel_process_group": group, "device": torch.device("cpu")},
    )
    return Trainer.criterion.fget(trainer)  # type: ignore[attr-defined]


def test_a_threshold_that_is_saved_and_does_not_learn_needs_no_wrapper(group: Any) -> None:
    confidence = Confidence(ConfidenceOptions(confidence="frames", confidence_relative=True))  # type: ignore[arg-type]
    assert len(list(confidence.parameters())) == 1
    assert criterion_of(confidence, group) is confidence
    assert isinstance(criterion_of(nn.Linear(2, 2), group, "legacy_ddp"), ModuleProxyWrapper), (
        "what learns is wrapped as ever"
    )
