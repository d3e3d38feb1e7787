"""The mask bank's file: one safetensors file whose metadata holds a JSON header; read with checks, written in one step.

tensors    NAME/mask/MODULE   uint8, see `MaskLayout`       NAME/tensor/FULL.NAME   trained tensors, as they were trained
metadata   s3distill.mask_bank = JSON, see `bank_header`
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
from torch import Tensor

from s3distill.masks.bank_checks import check_head, is_count
from s3distill.masks.bank_header import VERSION, EntryHeader, Header, mask_key, parse_header, tensor_key

try:
    import fcntl
except ImportError:  # not on every system
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

HEADER_KEY = "s3distill.mask_bank"

_FLOATS = ("F16", "BF16", "F32", "F64")

# what a file system answers that has no locks or no hard links
_UNSUPPORTED = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF}

Identity = tuple[int, int, int] | None  # of a file: inode, time and size; None = there is no file


def identity(path: Path) -> Identity:
    """Tells one state of a file from another; None where there is none."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def read_bank(path: Path) -> tuple[Any, Header]:
    """Opens a bank; reads its header, not its tensors.

    Returns:
        safetensors' handle, and the header, whose tensors are all there with the right sizes.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, damaged, no mask bank, or of a newer version.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"mask bank {path} does not exist; check the path, or make it with `s3distill masks pack`"
        )
    try:
        handle = safetensors.safe_open(path, framework="pt")  # type: ignore[no-untyped-call]
        metadata = handle.metadata() or {}
        stored = set(handle.keys())
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"mask bank {path} cannot be read: it must be a whole safetensors file, but is truncated, damaged or something else "
            f"({path.stat().st_size} bytes; {str(error)!r}); copy it again"
        ) from error
    if HEADER_KEY not in metadata:
        raise ValueError(
            f"{path} is no mask bank: its metadata must have the key {HEADER_KEY!r}, but has {sorted(metadata) or 'none'}; banks are made "
            "with `s3distill masks pack`"
        )
    with _damaged_header(path):
        values = json.loads(metadata[HEADER_KEY])
        version = values["version"]
        if not is_count(version) or version < 1:
            raise ValueError(f"the version must be a number from 1 on, but is {version!r}")
    if version > VERSION:
        raise ValueError(
            f"mask bank {path} has format version {version}, but this s3distill reads versions up to {VERSION}; upgrade s3distill"
        )
    with _damaged_header(path):
        header = parse_header(values)
    _check_tensors(handle, header, stored, path)
    return handle, header


@contextlib.contextmanager
def _damaged_header(path: Path) -> Iterator[None]:
    """Whatever is wrong in a header that another program wrote becomes one message."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError, ValueError) as error:
        shown = f"the key {error} is missing" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"mask bank {path} has a damaged header ({shown}); take a copy of it, or pack it anew"
        ) from error


def _check_tensors(handle: Any, header: Header, stored: set[str], path: Path) -> None:
    """The header's tensors and the file's are the same, and the masks have the sizes that their shapes ask for."""
    named = {key for name, entry in header.entries.items() for key in entry.keys(name)}
    if named != stored:
        raise ValueError(
            f"mask bank {path} is damaged: header and tensors must name the same, but without a tensor are "
            f"{sorted(named - stored)[:3] or 'none'} and without a name {sorted(stored - named)[:3] or 'none'}; take a copy of it"
        )
    for name, entry in header.entries.items():
        for module, layout in entry.masks.items():
            found = handle.get_slice(mask_key(name, module))
            if found.get_dtype() != "U8" or list(found.get_shape()) != [layout.num_bytes]:
                raise ValueError(
                    f"mask bank {path} is damaged: the mask of {module} in {name!r} must have {layout.num_bytes} bytes for the shape "
                    f"{layout.shape}, but has {found.get_shape()} of type {found.get_dtype()}; take a copy of it"
                )
        _check_trained(handle, name, entry, path)


def _check_trained(handle: Any, name: str, entry: EntryHeader, path: Path) -> None:
    """Trained tensors are numbers, and the head fits its mask and its dictionary."""
    found = {tensor: handle.get_slice(tensor_key(name, tensor)) for tensor in entry.tensors}
    wrong = [tensor for tensor, value in found.items() if value.get_dtype() not in _FLOATS]
    if wrong:
        raise ValueError(
            f"mask bank {path} is damaged: trained tensors must be of a type of {', '.join(_FLOATS)}, but {wrong[0]} in {name!r} is of "
            f"{found[wrong[0]].get_dtype()}; take a copy of it"
        )
    with _damaged_header(path):
        check_head(name, entry.symbols, entry.masks, {tensor: value.get_shape() for tensor, value in found.items()})


def write_bank(path: Path, header: Header, tensors: Mapping[str, Tensor], replaces: Identity) -> None:
    """Writes a bank to a temporary name and moves it into place, so that whatever happens the old file or the new one is there, whole.

    Args:
        replaces: the state of the file at ``path`` that ``tensors`` were read from; None = there is none.
    Raises:
        RuntimeError: another process has changed the file meanwhile; nothing is written.
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    with _locked(path):
        _require_unchanged(path, replaces)  # whoever waited for the lock need not write at all
        try:
            _write_temporary(temporary, path, header, tensors)
            _require_unchanged(path, replaces)
            if replaces is None:
                _publish(temporary, path)
            else:
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _write_temporary(temporary: Path, path: Path, header: Header, tensors: Mapping[str, Tensor]) -> None:
    temporary.touch()
    mode = temporary.stat().st_mode  # as the user's umask has it: safetensors makes files for their owner alone
    try:
        safetensors.torch.save_file(dict(tensors), temporary, {HEADER_KEY: header.to_json()})
    except safetensors.SafetensorError as error:
        raise OSError(f"mask bank {path} cannot be written ({error}); what was there is unchanged") from error
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    temporary.chmod(mode)


def _require_unchanged(path: Path, replaces: Identity) -> None:
    if identity(path) != replaces:
        raise RuntimeError(
            f"mask bank {path} must not change while it is written, but another process has just changed it; nothing was written: run "
            "the command again"
        )


def _publish(temporary: Path, path: Path) -> None:
    """Gives a new bank its name, if that is still free: unlike a renaming, a hard link never takes a file's place."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        _require_unchanged(path, None)
        raise
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        logger.warning("%s has no hard links (%s): nobody else may make %s now", path.parent, error, path.name)
        os.replace(temporary, path)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One at a time: of all processes that have read this state of the bank, only one checks and replaces it.

    The lock is on the bank itself, so that no file is left beside it. Who had to wait finds another bank in its place, which
    `_require_unchanged` sees; while this one is open, the system gives its inode to no other. Where there is no bank yet, or no
    ``fcntl``, there is nothing to lock.
    """
    if fcntl is None or not path.exists():
        yield
        return
    with _open_to_lock(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("mask bank %s is being written by another process: waiting for it", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            logger.warning("%s cannot be locked (%s): nobody else may change it now", path, error)
        yield


def _open_to_lock(path: Path) -> BinaryIO:
    try:
        return open(path, "rb+")  # network file systems lock what is open for writing
    except PermissionError:
        return open(path, "rb")
