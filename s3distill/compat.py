"""The one place that knows versions of fairseq, hydra and torch: safe checkpoint loading and repairs of stock code.

Loading runs no code from a file: `torch.load(weights_only=True)` with an allow-list of fairseq's and omegaconf's own
data types. `load_checkpoint` (no fairseq needed) maps those types to inert stand-ins and returns plain containers;
`install` gives the real types to stock fairseq, so that `fairseq-generate`, `w2v_path` and resuming work on torch >= 2.6.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import enum
import importlib
import importlib.util
import logging
import os
import pickle
import re
import sys
import typing
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

logger = logging.getLogger(__name__)

_OMEGACONF_TYPES = (
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.nodes.AnyNode",
    "omegaconf.nodes.StringNode",
    "omegaconf.nodes.IntegerNode",
    "omegaconf.nodes.FloatNode",
    "omegaconf.nodes.BooleanNode",
    "omegaconf.nodes.EnumNode",
    "omegaconf.nodes.PathNode",
    "omegaconf.nodes.BytesNode",
    "omegaconf.nodes.InterpolationResultNode",
)


def _dict_without_factory(*_: Any) -> dict[Any, Any]:
    """Stands for `collections.defaultdict`, which torch's unpickler makes but does not fill."""
    return {}


_PLAIN_TYPES: dict[str, Any] = {
    "argparse.Namespace": argparse.Namespace,
    "collections.defaultdict": _dict_without_factory,
    "typing.Any": Any,
    "typing.Union": typing.Union,
    "builtins.dict": dict,
    "builtins.list": list,
    "builtins.tuple": tuple,
    "builtins.set": set,
    "builtins.str": str,
    "builtins.int": int,
    "builtins.float": float,
    "builtins.bool": bool,
    "builtins.bytes": bytes,
    "builtins.object": object,
    "__builtin__.object": object,
    "__builtin__.dict": dict,
}
_FAIRSEQ_CLASSES = {  # data types that are neither dataclasses nor enums
    "fairseq.data.dictionary.Dictionary",
    "fairseq.meters.AverageMeter",
    "fairseq.meters.StopwatchMeter",
    "fairseq.meters.TimeMeter",
    "fairseq.logging.meters.AverageMeter",
    "fairseq.logging.meters.MetersDict",
    "fairseq.logging.meters.StopwatchMeter",
    "fairseq.logging.meters.SumMeter",
    "fairseq.logging.meters.TimeMeter",
}
# Packages whose dataclasses and enums may stand in a config; a function or any other class of them is refused.
_CONFIG_PACKAGES = ("fairseq", "s3distill", "examples")
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


class _StandIn:
    """Takes the place of a data type while unpickling: keeps the state, runs nothing."""

    def __new__(cls, *values: Any) -> _StandIn:
        self = object.__new__(cls)
        self.__dict__["values"] = values
        return self

    def __init__(self, *values: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a fairseq checkpoint into plain dicts, lists, strings, numbers and CPU tensors, without fairseq.

    Configs become dicts, enums their values, `argparse.Namespace` a dict, and a fairseq `Dictionary` a dict with ``symbols``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is corrupt or truncated, not a checkpoint, or its pickle needs a type that is not allowed.
    """
    allowed = [(_stand_in(name), name) for name in _types_in(path) if _is_data_type(name, resolve=False)]
    state = _plain(_torch_load(path, [*allowed, *_plain_globals()]))
    _require_checkpoint(state, path)
    return state


def _require_checkpoint(state: Any, path: str | os.PathLike[str]) -> None:
    if not isinstance(state, dict) or "model" not in state:
        held = f"a dict with {sorted(map(str, state))[:8]}" if isinstance(state, dict) else f"a {type(state).__name__}"
        raise ValueError(f"{path} is not a checkpoint: it must hold a dict with the key 'model', but holds {held}")


def _plain_globals() -> list[tuple[Any, str]]:
    """Python's and numpy's own data types, which old checkpoints hold beside tensors (numpy scalars of meters, namespaces)."""
    scalars = [type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "?")]
    return [
        *((value, name) for name, value in _PLAIN_TYPES.items()),
        (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
        (np._core.multiarray.scalar, "numpy._core.multiarray.scalar"),
        (np.dtype, "numpy.dtype"),
        *((scalar, f"numpy.dtypes.{scalar.__name__}") for scalar in scalars),
    ]


def _types_in(path: str | os.PathLike[str]) -> list[str]:
    """Every type or function that the file's pickle names beyond torch's own allow-list, without running it."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"checkpoint {path} does not exist; check the path")
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except ValueError:  # a file in torch's old (non-zip) format cannot be listed: allow what is known by name
        return sorted({*_OMEGACONF_TYPES, *_FAIRSEQ_CLASSES})
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise _corrupt(path, error) from error


def _corrupt(path: str | os.PathLike[str], error: Exception) -> ValueError:
    size = os.path.getsize(path)
    # torch's first lines advise weights_only=False; what went wrong stands behind them
    reason = next(iter(str(error).rpartition("WeightsUnpickler error:")[2].strip().splitlines()), type(error).__name__)
    return ValueError(
        f"checkpoint {path} cannot be read: it must be a file that torch.save wrote, but it is corrupt or truncated "
        f"({size} bytes; {reason}); copy or download it again"
    )


def _torch_load(path: str | os.PathLike[str], allowed: list[tuple[Any, str]]) -> Any:
    """Reads the file with the allow-list and turns torch's errors into ours."""
    try:
        with torch.serialization.safe_globals(allowed):  # type: ignore[arg-type]
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = [name for name in _types_in(path) if name not in {n for _, n in allowed}]
        if refused or "GLOBAL" in str(error):
            named = ", ".join(refused) or _named_global(str(error))
            raise ValueError(
                f"checkpoint {path} was refused: loading must not run code, and its pickle needs {named}, which is not a data "
                "type of fairseq or omegaconf. If you trust the file, convert it once in the environment that wrote it: "
                "state = torch.load(path, weights_only=False); torch.save({'model': state['model'], 'cfg': state['cfg']}, new_path)"
            ) from error
        raise _corrupt(path, error) from error
    except Exception as error:  # a damaged pickle fails in any way: KeyError, UnicodeDecodeError, struct.error, ...
        raise _corrupt(path, error) from error


def _named_global(message: str) -> str:
    words = message.split("GLOBAL ", 1)
    return words[1].split()[0] if len(words) == 2 else "an unknown type"


def _is_data_type(name: str, resolve: bool) -> bool:
    """Whether a pickled name is a data type: omegaconf's nodes, named fairseq classes, or a config's dataclass or enum.

    With ``resolve`` the object is looked at, if its module is imported already (importing one on the file's word would run
    it); otherwise a stand-in will be used, which cannot run anything, and the name's package decides.
    """
    if name in _OMEGACONF_TYPES or name in _FAIRSEQ_CLASSES or name in _PLAIN_TYPES:
        return True
    module, _, attribute = name.rpartition(".")
    package = module.split(".")[0]
    if package not in _CONFIG_PACKAGES:
        return False
    if not resolve:
        return attribute[:1].isupper()  # a class by convention; the stand-in makes it inert either way
    found = getattr(sys.modules.get(module), attribute, None)
    return isinstance(found, type) and (issubclass(found, enum.Enum) or dataclasses.is_dataclass(found))


def _resolve(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def _stand_in(name: str) -> Any:
    if name in _PLAIN_TYPES:
        return _PLAIN_TYPES[name]
    return type(name.rpartition(".")[2], (_StandIn,), {"__module__": name.rpartition(".")[0]})


def _plain(value: Any) -> Any:
    """Stand-ins, namespaces and containers -> plain Python; tensors and scalars as they are."""
    if isinstance(value, _StandIn):
        return _plain_stand_in(value)
    if isinstance(value, argparse.Namespace):
        return {k: _plain(v) for k, v in vars(value).items()}
    if isinstance(value, Mapping):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _plain_stand_in(value: _StandIn) -> Any:
    state = vars(value)
    if "_content" in state:  # DictConfig and ListConfig
        return _plain(state["_content"])
    if "_val" in state:  # a leaf node
        return _plain(state["_val"])
    if "symbols" in state and "indices" in state:  # Dictionary
        return {"symbols": list(state["symbols"]), "counts": list(state.get("count", []))}
    values = state.get("values", ())
    if len(values) == 1 and len(state) == 1:  # an enum member is pickled as Enum(value)
        return _plain(values[0])
    return {k: _plain(v) for k, v in state.items() if k != "values"}


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
    package = Path(__file__).parent
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
    checkpoint_utils.convert_namespace_to_omegaconf = _with_nested_args(checkpoint_utils.convert_namespace_to_omegaconf)


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

    spellings = (Path(__file__).parent, Path(utils.__file__).parent / ".." / "s3distill")
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
            _require_checkpoint(_torch_load(path, allowed), path)  # says so where the file is at fault
            raise
        _refuse_code(state.get("cfg"), path)
        _refuse_code(state.get("args"), path)
        return state

    load_checkpoint_to_cpu.is_s3distill = True  # type: ignore[attr-defined]
    return load_checkpoint_to_cpu


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


def write_checkpoint(
    path: str | os.PathLike[str],
    model_state: Mapping[str, Any],
    model_options: Mapping[str, Any],
    task_options: Mapping[str, Any],
) -> None:
    """Writes weights and config as a fairseq checkpoint (updates 0, no optimizer), to a temporary name that is then renamed."""
    state = {
        "args": None,
        "cfg": {
            "_name": None,
            "model": dict(model_options),
            "task": dict(task_options),
            "criterion": None,
            "lr_scheduler": None,
        },
        "model": dict(model_state),
        "criterion": None,
        "optimizer_history": [
            {"criterion_name": "none", "optimizer_name": "none", "lr_scheduler_state": {}, "num_updates": 0}
        ],
        "task_state": {},
        "extra_state": {
            "metrics": None,
            "previous_training_time": 0,
            "train_iterator": {"epoch": 1, "iterations_in_epoch": 0},
        },
        "last_optimizer_state": None,
    }
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        torch.save(state, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
