"""Reading and writing checkpoints without running code from them, with or without fairseq.

`torch.load(weights_only=True)` with an allow-list of fairseq's and omegaconf's own data types; `load_checkpoint` maps those
types to inert stand-ins and returns plain containers.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import importlib
import os
import pickle
import sys
import typing
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

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


def _enum_member(cls: Any, name: str) -> Any:
    """What `getattr(cls, name)` may do in a pickle: name a member of an enum, as Python before 3.11.4 writes them.

    Of a stand-in it gives the member's value where the enum is imported already, else its name.
    """
    if isinstance(cls, type) and issubclass(cls, enum.Enum) and name in cls.__members__:
        return cls[name]
    if isinstance(cls, type) and issubclass(cls, _StandIn):
        found = getattr(sys.modules.get(cls.__module__), cls.__name__, None)
        if isinstance(found, type) and issubclass(found, enum.Enum) and name in found.__members__:
            return cls(found[name].value)
        return cls(name)
    raise pickle.UnpicklingError(f"GLOBAL getattr of {cls!r} is no member of an enum")


_PLAIN_TYPES |= {"builtins.getattr": _enum_member, "__builtin__.getattr": _enum_member}


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a checkpoint into plain dicts, lists, strings, numbers and CPU tensors, without fairseq.

    A file of fairseq or WavLM: configs become dicts, enums their values, `argparse.Namespace` a dict, and a fairseq
    `Dictionary` a dict with ``symbols``. Or a folder of `transformers` or `s3distill convert`, see `huggingface.read_folder`.
    `encoder.checkpoint.parse_checkpoint` takes all of them apart.

    Raises:
        FileNotFoundError: there is no such file, or the folder lacks some.
        ValueError: the file is corrupt or truncated, not a checkpoint, or its pickle needs a type that is not allowed.
    """
    if os.path.isdir(path):
        from s3distill.compat.huggingface import read_folder  # which reads pickles with this module

        return read_folder(path)
    allowed = [(_stand_in(name), name) for name in _types_in(path) if _is_data_type(name, resolve=False)]
    state = _plain(_torch_load(path, [*allowed, *_plain_globals()]))
    _require_checkpoint(state, path)
    return state


def checkpoint_size(path: str | os.PathLike[str]) -> int:
    """Bytes of a checkpoint, or of a folder's files of weights."""
    if os.path.isdir(path):
        from s3distill.compat.huggingface import folder_size

        return folder_size(path)
    return os.path.getsize(path)


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
    if os.path.isdir(path):
        raise IsADirectoryError(
            f"{path} is a folder, and stock fairseq reads files only; make one of it first: s3distill convert {path} model.pt"
        )
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


def write_checkpoint(
    path: str | os.PathLike[str],
    model_state: Mapping[str, Any],
    model_options: Mapping[str, Any],
    task_options: Mapping[str, Any],
    task_state: Mapping[str, Any] | None = None,
    written_by: str = "",
) -> None:
    """Writes weights and config as a fairseq checkpoint (updates 0, no optimizer), to a temporary name that is then renamed.

    ``task_state`` is the task's (a dictionary); ``written_by`` stays in the file's ``extra_state``.
    """
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
        "task_state": dict(task_state or {}),
        "extra_state": {
            **({"written_by": written_by} if written_by else {}),
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
