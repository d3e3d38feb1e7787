"""How a training starts: from another run, as a job of a sweep, or to validate alone; what fairseq's trainer does not say or check."""

from __future__ import annotations

import logging
import os
from typing import Any

logger = logging.getLogger(__name__)

_starting = False  # while fairseq's trainer loads checkpoint.finetune_from_model


def starts_from_another_run() -> bool:
    """Whether the state that is being loaded starts a new run (``checkpoint.finetune_from_model``) and does not resume one."""
    return _starting


def know_starts() -> None:
    """Tells models that load a state what fairseq's trainer knows: whether it is another run's."""
    from fairseq.trainer import Trainer

    stock = Trainer.load_checkpoint

    def load_checkpoint(self: Any, filename: str, *values: Any, **options: Any) -> Any:
        global _starting
        cfg = self.cfg.checkpoint
        restored = filename == cfg.restore_file != "checkpoint_last.pt" and cfg.reset_optimizer
        _starting = filename == cfg.finetune_from_model or restored
        _require_start(self.cfg.model, filename)
        forget_last_run()
        _check_sweep()
        try:
            return stock(self, filename, *values, **options)
        finally:
            _starting = False

    Trainer.load_checkpoint = load_checkpoint


def _require_start(model: Any, filename: str) -> None:
    """Refuses options that are about what is loaded, where nothing is; fairseq would go on with what was built."""
    if os.path.exists(filename):
        return
    wanted = [name for name in ("eval_only", "load_mask_only", "load_mask_before") if getattr(model, name, None)]
    if wanted:
        raise ValueError(
            f"`model.{wanted[0]}` is about a trained model, but there is none to load: no file {filename}; pass "
            "checkpoint.finetune_from_model=RUN.pt"
        )


def forget_last_run() -> None:
    """fairseq keeps a run's best score and its patience on functions, where the next job of a sweep in this process finds them."""
    from fairseq import checkpoint_utils
    from fairseq_cli import train

    for function in (checkpoint_utils.save_checkpoint, train.should_stop_early):
        for name in ("best", "num_runs"):
            vars(function).pop(name, None)


_folders: set[str] = set()  # of the jobs of a sweep that ran in this process


def require_own_folder(folder: str, folders: set[str]) -> None:
    """Refuses a job of a sweep that would go on from the checkpoint of the one before, since both write to the same folder."""
    if folder in folders:
        raise ValueError(
            f"two jobs of this sweep write to {folder}: hydra.sweep.subdir does not name what differs between them; pass e.g. "
            "'hydra.sweep.subdir=${hydra.job.num}'"
        )
    folders.add(folder)


def _check_sweep() -> None:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        require_own_folder(str(HydraConfig.get().runtime.output_dir), _folders)


def know_eval_only() -> None:
    """``model.eval_only``: validate the loaded model once and stop, in place of the first epoch."""
    from fairseq_cli import train as training

    stock = training.train

    def train(cfg: Any, trainer: Any, task: Any, epoch_itr: Any) -> tuple[list[float | None], bool]:
        if not getattr(cfg.model, "eval_only", False):
            result: tuple[list[float | None], bool] = stock(cfg, trainer, task, epoch_itr)
            return result
        subsets = [subset.strip() for subset in cfg.dataset.valid_subset.split(",")]
        losses = training.validate(cfg, trainer, task, epoch_itr, subsets)
        logger.info(
            "eval_only: validated %s at update %d, nothing was trained", ", ".join(subsets), trainer.get_num_updates()
        )
        return losses, True

    training.train = train
