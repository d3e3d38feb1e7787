"""The file of a Fisher information: one safetensors file, ``fisher.NAME`` and ``mean.NAME`` for every parameter NAME.

Its metadata holds a JSON object under ``s3distill.fisher``: what it was computed from.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch

from s3distill.analysis.fisher import Fisher
from s3distill.data.manifest import current_umask

HEADER_KEY = "s3distill.fisher"
VERSION = 1
SUFFIX = ".safetensors"
_VALUE, _MEAN = "fisher.", "mean."


def check_output(path: str | os.PathLike[str]) -> Path:
    """The path to write to, looked at before anything is computed.

    Raises:
        ValueError: another ending than `SUFFIX`, or no such folder.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise ValueError(f"a Fisher file must end in {SUFFIX}, but is {path}")
    if path.is_dir():
        raise ValueError(f"a Fisher file must be a file, but {path} is a folder; choose another name")
    if not path.parent.is_dir():
        raise ValueError(f"the folder of the file must exist, but {path.parent} does not; make it first")
    return path


def write_fisher(path: str | os.PathLike[str], fisher: Fisher) -> None:
    """Writes the file whole or not at all."""
    path = check_output(path)
    header = {
        "version": VERSION,
        "fingerprint": fisher.fingerprint(),
        **{name: asdict(fisher)[name] for name in ("num_utterances", "targets", "symbols")},
    }
    tensors = {f"{_VALUE}{name}": value.contiguous() for name, value in fisher.values.items()}
    tensors |= {f"{_MEAN}{name}": value.contiguous() for name, value in fisher.means.items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        safetensors.torch.save_file(tensors, temporary, {HEADER_KEY: json.dumps(header)})
        temporary.chmod(0o666 & ~current_umask())  # safetensors makes files for their owner alone
        os.replace(temporary, path)
    except safetensors.SafetensorError as error:
        raise OSError(f"{path} cannot be written ({error}); what was there is unchanged") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_fisher(path: str | os.PathLike[str]) -> Fisher:
    """Reads what `write_fisher` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, no Fisher file, or of a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no Fisher file {path}; write it with s3distill fisher CKPT MANIFEST -o {path}"
        )
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = _header(path, file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it is no mapping
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} must be a Fisher file, but is damaged or none ({error}); write it again") from error
    values = {key.removeprefix(_VALUE): value for key, value in tensors.items() if key.startswith(_VALUE)}
    means = {key.removeprefix(_MEAN): value for key, value in tensors.items() if key.startswith(_MEAN)}
    if not values or {k: v.shape for k, v in values.items()} != {k: v.shape for k, v in means.items()}:
        raise ValueError(f"{path} must hold a Fisher value for each mean, but does not; write it again")
    fisher = Fisher(values, means, int(header["num_utterances"]), str(header["targets"]), tuple(header["symbols"]))
    if fisher.fingerprint() != header["fingerprint"]:
        raise ValueError(f"{path} is damaged: its means are not those that it was written with; write it again")
    return fisher


def _header(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    if HEADER_KEY not in metadata:
        raise ValueError(
            f"{path} must be a Fisher file of s3distill fisher, but has no {HEADER_KEY} in its metadata; another safetensors file?"
        )
    try:
        header = json.loads(metadata[HEADER_KEY])
        version = header["version"]
        missing = {"fingerprint", "num_utterances", "targets", "symbols"} - header.keys()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: its header cannot be read ({error}); write it again") from error
    if version != VERSION or missing:
        raise ValueError(
            f"{path} has version {version!r} of Fisher files, but this s3distill reads {VERSION}; upgrade, or write it again"
        )
    return dict(header)
