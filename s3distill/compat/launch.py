"""What happens between `fairseq-hydra-train` reading its configuration and fairseq starting on it.

fairseq imports ``common.user_dir`` only after it has merged the options and started its processes, which is too late for
two things: refusing to start where it would start nothing, and one recipe for two models of which one knows fewer options.
A recipe reaches in earlier with a hydra callback:

    hydra:
      callbacks:
        s3distill:
          _target_: s3distill.compat.launch.LaunchCallback
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

logger = logging.getLogger(__name__)

# ranks that meet at such an address are all on this machine; others may be started elsewhere
_LOOPBACK = re.compile(r"\w+://(localhost|127\.\d+\.\d+\.\d+|\[::1\]):")
_MASKED = "wav2vec_ctc_st"  # the model whose recipes other models may be run with


class LaunchCallback(Callback):
    """Puts `prepare` in front of fairseq's own start, for each job of a run or a sweep."""

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        prepare()


def prepare(check: Callable[[DictConfig], None] | None = None) -> None:
    """Makes `fairseq_cli.hydra_train` check what it was given before it starts; a second call only adds its ``check``.

    Args:
        check: called with the composed configuration; raises what is wrong with it.
    """
    from fairseq_cli import hydra_train

    checks = getattr(hydra_train.add_defaults, "checks", None)
    if checks is not None:
        checks.extend([check] if check else [])
        return
    stock = hydra_train.add_defaults
    checks = [check] if check else []

    def add_defaults(cfg: DictConfig) -> None:
        check_devices(cfg)
        leave_out_foreign_options(cfg)
        for further in checks:
            further(cfg)
        stock(cfg)

    add_defaults.checks = checks  # type: ignore[attr-defined]
    hydra_train.add_defaults = add_defaults


def check_devices(cfg: DictConfig) -> None:
    """Refuses a start that would spawn no process, or fewer than the ranks wait for.

    fairseq spawns one process per visible GPU when ``distributed_init_method`` is set: without a GPU none, and it exits
    with status 0 after training nothing.

    Raises:
        RuntimeError: with the options to change.
    """
    options = cfg.get("distributed_training") or {}
    method, world_size = options.get("distributed_init_method"), options.get("distributed_world_size")
    num_gpus = torch.cuda.device_count()
    common = cfg.get("common") or {}
    if num_gpus == 0 and common.get("fp16") and not common.get("tpu"):
        if not (common.get("fp16_no_flatten_grads") or common.get("memory_efficient_fp16")):
            raise RuntimeError(
                "common.fp16 gathers its gradients on a GPU, but there is no GPU here; pass common.fp16=false to train on the CPU"
            )
        logger.warning("common.fp16 on a CPU is slow and stops at the first overflow; pass common.fp16=false")
    if options.get("distributed_no_spawn"):
        return  # the ranks are started one by one
    launched = all(name in os.environ for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK"))
    if num_gpus == 0 and (method or (world_size or 1) > 1) and not launched:
        came = f"distributed_init_method={method}" if method else f"distributed_world_size={world_size}"
        raise RuntimeError(
            f"distributed_training.{came} starts one process per GPU, but there is no GPU here, so nothing would be trained; leave "
            "distributed_init_method out and pass distributed_training.distributed_world_size=1 common.fp16=false to train on the CPU"
        )
    if method and world_size and num_gpus < world_size and _LOOPBACK.match(method):
        visible = f"{num_gpus} GPU is" if num_gpus == 1 else f"{num_gpus} GPUs are"
        raise RuntimeError(
            f"distributed_training.distributed_world_size is {world_size}, but {visible} visible, so {num_gpus} would wait for the others "
            f"for ever; pass distributed_training.distributed_world_size={num_gpus}, or make more GPUs visible"
        )


def leave_out_foreign_options(cfg: DictConfig) -> None:
    """Takes the options of `wav2vec_ctc_st` out of ``cfg.model`` where another model was chosen that does not know them.

    So the recipe with masks trains the dense model that it is compared with, under the same values.

    Raises:
        ValueError: one of them was given on the command line, where it would do nothing.
    """
    from fairseq.models import MODEL_DATACLASS_REGISTRY

    model = cfg.get("model")
    name = model.get("_name") if OmegaConf.is_dict(model) else None
    if name == _MASKED or name not in MODEL_DATACLASS_REGISTRY:
        return
    known = {f.name for f in fields(MODEL_DATACLASS_REGISTRY[name])}
    foreign = [f.name for f in fields(MODEL_DATACLASS_REGISTRY[_MASKED]) if f.name not in known and f.name in model]
    if not foreign:
        return
    typed = (
        [o.lstrip("+").partition("=")[0] for o in HydraConfig.get().overrides.task] if HydraConfig.initialized() else []
    )
    wrong = [f"model.{option}" for option in foreign if f"model.{option}" in typed]
    if wrong:
        raise ValueError(
            f"{', '.join(wrong)}: belongs to the model {_MASKED}, but model._name is {name}, which would ignore it; leave it out or pass "
            f"model._name={_MASKED}"
        )
    with open_dict(model):
        for option in foreign:
            del model[option]
    logger.info("model._name=%s: the recipe's %d options of %s are left out", name, len(foreign), _MASKED)
