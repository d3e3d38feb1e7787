"""Writes folders of config.json and model.safetensors: all of it or nothing, and over nothing but a folder of its own."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from s3distill.encoder.folder import MODEL_TYPE

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def write_folder(path: str | os.PathLike[str], contents: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes a folder beside its place and renames it, so that what is read there is whole.

    Args:
        contents, tensors: what config.json and model.safetensors hold, see `encoder.folder.to_folder`.
    Raises:
        FileExistsError: something else is there.
    """
    target = Path(path)
    check_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (target.with_name(f".{target.name}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    try:
        temporary.mkdir()
        (temporary / CONFIG).write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
        save_file({name: _alone(value) for name, value in tensors.items()}, temporary / WEIGHTS, {"format": "pt"})
        if target.exists():
            os.replace(target, old)
        os.replace(temporary, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.replace(old, target)
        raise
    finally:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)


def check_replaceable(path: str | os.PathLike[str]) -> None:
    """Refuses (`FileExistsError`) a place where there is anything but an empty folder or one that `write_folder` wrote."""
    target = Path(path)
    if not os.path.lexists(target):
        return
    names = {file.name for file in target.iterdir()} if target.is_dir() and not target.is_symlink() else None
    if names == set() or (names == {CONFIG, WEIGHTS} and _model_type(target / CONFIG) == MODEL_TYPE):
        return
    raise FileExistsError(
        f"{target} is there already and is no folder that s3distill wrote, so it is left as it is; name another folder, or remove it"
    )


def _model_type(file: Path) -> Any:
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return None
    return contents.get("model_type") if isinstance(contents, dict) else None


def _alone(value: Tensor) -> Tensor:
    """The tensor with memory of its own, which safetensors asks for; a copy only where it shares some."""
    value = value.detach().cpu()
    whole = value.is_contiguous() and value.untyped_storage().nbytes() == value.numel() * value.element_size()
    return value if whole else value.contiguous().clone()
