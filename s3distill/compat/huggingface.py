"""Reads Hugging Face folders: config.json beside model.safetensors or pytorch_model.bin, in one file or in shards.

What the contents mean is `s3distill.encoder.huggingface`'s to say. Nothing in a folder can run code: JSON, safetensors, and
pickles with ``weights_only=True``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from s3distill.compat.loading import _plain_globals, _torch_load

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first one that is there is read, or its `.index.json`
_LFS_POINTER = b"version https://git-lfs"


def read_folder(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A folder as `encoder.huggingface.from_huggingface` takes it.

    Returns:
        ``model``: CPU tensors by name; ``huggingface``: contents of config.json (``config``), preprocessor_config.json
        (``preprocessor``) and vocab.json (``vocab``), the latter two None where they are not there.
    Raises:
        FileNotFoundError: there is no config.json, or no weights, or not all of their files.
        ValueError: a file is damaged, incomplete or refused.
    """
    folder = Path(path)
    config = _json(folder / "config.json")
    if config is None:
        raise FileNotFoundError(
            f"{folder} is a folder without config.json; a checkpoint is a file, or a folder of Hugging Face's transformers or of "
            "`s3distill convert` with config.json and model.safetensors"
        )
    preprocessor = _json(folder / "preprocessor_config.json")
    if preprocessor is None:  # newer versions keep it inside
        preprocessor = (_json(folder / "processor_config.json") or {}).get("feature_extractor")
    files = {"config": config, "preprocessor": preprocessor, "vocab": _json(folder / "vocab.json")}
    return {"model": _weights(folder), "huggingface": files}


def folder_size(path: str | os.PathLike[str]) -> int:
    """Bytes of the files that `read_folder` takes weights from."""
    _, files = _weight_files(Path(path))
    return sum(file.stat().st_size for file in files)


def _weights(folder: Path) -> dict[str, Tensor]:
    weight_map, files = _weight_files(folder)
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= _tensors(file)
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise ValueError(
            f"{folder} is not whole: its index names {missing[:3]} ({len(missing)} tensors in all), which are in none of its "
            f"{len(files)} files; download it again"
        )
    return tensors


def _weight_files(folder: Path) -> tuple[dict[str, str], list[Path]]:
    """The index of the shards (tensor -> file; empty for a single file) and the files."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return {}, [folder / name]
        index = _json(folder / f"{name}.index.json")
        if index is None:
            continue
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(Path(str(f)).name == f for f in weight_map.values()):
            raise ValueError(
                f"{folder / name}.index.json must have a `weight_map` of tensors to files beside it; download it again"
            )
        files = [folder / file for file in sorted(set(weight_map.values()))]
        lacking = [file.name for file in files if not file.is_file()]
        if lacking:
            raise FileNotFoundError(
                f"{folder} is not whole: {', '.join(lacking[:5])} ({len(lacking)} of {len(files)} files) are not there; download it again"
            )
        return weight_map, files
    others = sorted(
        file.name for file in folder.iterdir() if file.suffix in (".h5", ".msgpack", ".incomplete", ".part")
    )
    raise FileNotFoundError(
        f"{folder} has a config.json, but no weights: there must be {' or '.join(WEIGHTS)}, or its shards with their .index.json"
        f"{f' ({chr(44).join(others)} cannot be read)' if others else ''}; was it downloaded completely?"
    )


def _tensors(file: Path) -> dict[str, Tensor]:
    with open(file, "rb") as stream:
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(
                f"{file} is a git-lfs pointer and not the weights themselves; run `git lfs pull` in that folder"
            )
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(
                f"{file} cannot be read: it is corrupt or not complete ({file.stat().st_size} bytes; {error}); download it again"
            ) from error
    state = _torch_load(file, _plain_globals())
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file} must hold tensors by name, but holds something else; is it a model of transformers?")
    return dict(state)


def _json(file: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is no such file."""
    if not file.is_file():
        return None
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # also UnicodeDecodeError
        raise ValueError(f"{file} is not valid JSON ({error}); was it downloaded completely?") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{file} must hold a JSON object, but holds {type(contents).__name__}")
    return contents
