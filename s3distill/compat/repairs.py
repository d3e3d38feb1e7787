"""Repairs of stock fairseq in this process: safe loading on torch >= 2.6, and whole checkpoint copies."""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import importlib
import importlib.util
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from s3distill.compat.bleu import know_empty_transcripts
from s3distill.compat.distributed import know_criterions_that_do_not_learn
from s3distill.compat.half_precision import know_changed_weights
from s3distill.compat.loading import (
    _FAIRSEQ_CLASSES,
    _OMEGACONF_TYPES,
    _PLAIN_TYPES,
    _is_data_type,
    _plain_globals,
    _require_checkpoint,
    _resolve,
    _torch_load,
    _types_in,
)
from s3distill.compat.seq2seq import know_decoders
from s3distill.compat.starts import know_eval_only, know_starts

logger = logging.getLogger(__name__)

# Options that some model, task, criterion or optimizer of stock fairseq hands to eval() when it is built from a checkpoint.
_RESOLVER_CALL = re.compile(r"\$\{[^}]*:")
_EVALUATED_OPTIONS = {
    *("conv_feature_layers", "conv_aggregator_layers", "feature_encoder_spec", "character_filters", "wer_args"),
    *("encoder_layers", "decoder_layers", "encoder_attention", "decoder_attention", "self_attention", "project_input"),
    *("gated_attention", "downsample", "pretrained", "adaptive_softmax_cutoff", "adaptive_input_cutoff"),
    *("pipeline_balance", "pipeline_devices", "pipeline_encoder_balance", "pipeline_encoder_devices"),
    *("pipeline_decoder_balance", "pipeline_decoder_devices", "left_pad_source", "left_pad_target"),
    *("xformers_att_config", "encoder_xformers_att_config", "decoder_xformers_att_config"),
    *("adam_betas", "adamax_betas", "adafactor_eps", "lamb_betas"),
}
_LITERAL_NODES = (
    *(ast.Expression, ast.Constant, ast.Name, ast.List, ast.Tuple, ast.Dict, ast.BinOp, ast.UnaryOp),
    *(ast.Add, ast.Sub, ast.Mult, ast.unaryop, ast.expr_context),
)


def fairseq_usable() -> bool:
    """Whether fairseq is installed and loads; an installation that is broken gives a warning, so that `load` and `doctor` still run."""
    if importlib.util.find_spec("fairseq") is None:
        return False
    try:
        importlib.import_module("fairseq.models")
    except (ImportError, OSError, AttributeError, ValueError) as error:
        logger.warning(
            "fairseq is installed but does not load (%s: %s); run `s3distill doctor`", type(error).__name__, error
        )
        return False
    return True


def import_shells() -> None:
    """Imports every registered shell once; fairseq's own ``--user-dir`` would leave out criterions and optimizers."""
    package = Path(__file__).parents[1]
    for room in ("tasks", "models", "criterions", "optim", "scoring"):
        for file in sorted((package / room).glob("*.py")):
            if not file.name.startswith("_"):
                importlib.import_module(f"s3distill.{room}.{file.stem}")


def install() -> None:
    """Repairs stock fairseq in this process, once: safe loading on torch >= 2.6, and checkpoint copies that cannot be torn."""
    from fairseq import checkpoint_utils
    from fairseq.distributed import utils as distributed_utils
    from fairseq.file_io import PathManager

    if getattr(checkpoint_utils.load_checkpoint_to_cpu, "is_s3distill", False):
        return
    root_logger = logging.getLogger()
    if root_logger.level == logging.DEBUG and os.environ.get("LOGLEVEL", "").upper() != "DEBUG":
        root_logger.setLevel(logging.INFO)  # fairseq.models.wav2vec.wav2vec2_classification leaves it at DEBUG
    checkpoint_utils.load_checkpoint_to_cpu = _safe_loader(checkpoint_utils.load_checkpoint_to_cpu)
    distributed_utils.broadcast_object = _safe_broadcast(distributed_utils.broadcast_object)
    PathManager.copy = staticmethod(_atomic_copy(PathManager.copy))
    _know_user_dir()
    _repair_hubert_ctc()
    know_decoders()
    checkpoint_utils.convert_namespace_to_omegaconf = _with_nested_args(checkpoint_utils.convert_namespace_to_omegaconf)
    know_starts()
    know_eval_only()
    know_changed_weights()
    know_criterions_that_do_not_learn()
    know_empty_transcripts()
    _register_data2vec()


def _register_data2vec() -> None:
    """Registers fairseq's `data2vec_audio`, which only its examples hold, so that stock models fine-tune it without a second user_dir."""
    for name in ("fairseq.examples.data2vec.models.data2vec_audio", "examples.data2vec.models.data2vec_audio"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
            return


def _with_nested_args(stock: Callable[[argparse.Namespace], Any]) -> Callable[[argparse.Namespace], Any]:
    """`convert_namespace_to_omegaconf` for fine-tuned ``args``-style files: they nest the encoder's, and hydra >= 1.1 fails on it."""
    from omegaconf import open_dict

    def convert(args: argparse.Namespace) -> Any:
        nested = getattr(args, "w2v_args", None)
        if not isinstance(nested, argparse.Namespace):
            return stock(args)
        cfg = stock(argparse.Namespace(**{**vars(args), "w2v_args": None}))
        with open_dict(cfg):
            cfg.model.w2v_args = convert(nested)
        return cfg

    return convert


def _know_user_dir() -> None:
    """Lets ``user_dir=s3distill`` pass when the package was imported before: fairseq spells it fairseq/../s3distill then."""
    from fairseq import utils

    spellings = (Path(__file__).parents[1], Path(utils.__file__).parent / ".." / "s3distill")
    memo = getattr(utils.import_user_module, "memo", set())
    utils.import_user_module.memo = memo | {os.path.abspath(s) for s in spellings} | {str(s) for s in spellings}


def _repair_hubert_ctc() -> None:
    """Stock `hubert_ctc` of fairseq main reads an option that its config does not have."""
    from fairseq.models.hubert import hubert_asr
    from omegaconf import OmegaConf, open_dict

    stock = hubert_asr.HubertEncoder.__init__

    def __init__(self: Any, cfg: Any, task: Any) -> None:
        if OmegaConf.is_config(cfg) and "autoregressive" not in cfg:
            with open_dict(cfg):
                cfg.autoregressive = False
        stock(self, cfg, task)

    hubert_asr.HubertEncoder.__init__ = __init__


def _safe_loader(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`fairseq.checkpoint_utils.load_checkpoint_to_cpu`, reading fairseq's types with ``weights_only=True``."""

    def load_checkpoint_to_cpu(path: str, arg_overrides: Any = None, load_on_all_ranks: bool = False) -> Any:
        # the plain types come with their stand-ins: under two entries of one name, torch would take either
        names = [name for name in _types_in(path) if name not in _PLAIN_TYPES and _is_data_type(name, resolve=True)]
        allowed = [*_resolvable(names), *_plain_globals()]
        try:
            with torch.serialization.safe_globals(allowed), _weights_only():  # type: ignore[arg-type]
                state = stock(path, arg_overrides, load_on_all_ranks)
        except Exception:
            _require_fairseqs(_torch_load(path, allowed), path)  # says so where the file is at fault
            raise
        _refuse_code(state.get("cfg"), path)
        _refuse_code(state.get("args"), path)
        return state

    load_checkpoint_to_cpu.is_s3distill = True  # type: ignore[attr-defined]
    return load_checkpoint_to_cpu


def _require_fairseqs(state: Any, path: str | os.PathLike[str]) -> None:
    _require_checkpoint(state, path)
    if isinstance(state.get("cfg"), dict) and "model" not in state["cfg"] and "encoder_layers" in state["cfg"]:
        raise ValueError(
            f"{path} is a WavLM in its own layout, which no stock model of fairseq reads; make a file of it that does: s3distill "
            f"convert {path} model.pt"
        )


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """Stock code's `torch.load` reads weights only, whatever it asks for and whatever TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD says."""
    stock = torch.load
    torch.load = lambda *values, **options: stock(*values, **{**options, "weights_only": True})  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.load = stock


def _refuse_code(config: Any, path: str | os.PathLike[str]) -> None:
    """Refuses a config in which an option that stock fairseq evaluates is more than a literal (``[(512, 10, 5)] * 2``).

    Interpolations of omegaconf are refused there too, and calls of its resolvers (``${name:...}``) everywhere: what they become is
    not in the file.
    """
    from omegaconf import OmegaConf

    if OmegaConf.is_config(config):
        config = OmegaConf.to_container(config, resolve=False)
    if isinstance(config, argparse.Namespace) or dataclasses.is_dataclass(config):
        config = vars(config)
    if isinstance(config, str) and _RESOLVER_CALL.search(config):
        raise ValueError(
            f"checkpoint {path} was refused: loading must not run code, but its config calls a resolver of omegaconf, {config[:80]!r}"
        )
    if isinstance(config, (list, tuple)):
        for value in config:
            _refuse_code(value, path)
    if not isinstance(config, Mapping):
        return
    for name, value in config.items():
        if name in _EVALUATED_OPTIONS and not _is_literal(value):
            raise ValueError(
                f"checkpoint {path} was refused: loading must not run code, but fairseq evaluates its option `{name}`, which must "
                f"be a literal such as [(512, 10, 5)] * 2, and is {value!r}"
            )
        _refuse_code(value, path)


def _is_literal(value: Any) -> bool:
    if not isinstance(value, str):
        return not isinstance(value, (bytes, bytearray, memoryview))
    if "${" in value:
        return False  # an interpolation could become anything, also inside of quotes or a comment
    try:
        tree = ast.parse(value.strip(), mode="eval")
    except SyntaxError:
        return True  # eval() would fail on it too
    except (ValueError, RecursionError, MemoryError):
        return False
    return all(isinstance(node, _LITERAL_NODES) for node in ast.walk(tree))


def _safe_broadcast(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`fairseq.distributed.utils.broadcast_object`: resuming on several ranks sends the config beside the tensors."""

    def broadcast_object(*values: Any, **options: Any) -> Any:
        names = [*_OMEGACONF_TYPES, *_FAIRSEQ_CLASSES, "fairseq.distributed.utils._TensorPlaceholder"]
        with torch.serialization.safe_globals([*_resolvable(names), *_plain_globals()]), _weights_only():  # type: ignore[arg-type]
            return stock(*values, **options)

    return broadcast_object


def _resolvable(names: list[str]) -> list[tuple[Any, str]]:
    found = []
    for name in names:
        try:
            found.append((_resolve(name), name))
        except (ImportError, AttributeError):  # a type of another fairseq or omegaconf version
            continue
    return found


def _atomic_copy(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Copies to a temporary name and renames, so that a kill in the middle leaves the old ``checkpoint_last.pt`` whole."""

    def copy(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
        if not overwrite and os.path.exists(dst_path):
            return bool(stock(src_path, dst_path, overwrite=overwrite))
        temporary = f"{dst_path}.tmp"
        try:
            copied = bool(stock(src_path, temporary, overwrite=True))
            if copied:
                os.replace(temporary, dst_path)
        finally:
            Path(temporary).unlink(missing_ok=True)
        return copied

    return copy
