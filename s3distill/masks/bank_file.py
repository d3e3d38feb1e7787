"""The mask bank's file: one safetensors file whose metadata holds a JSON header; read with checks, written in one step.

tensors    NAME/mask/MODULE   uint8, see `MaskLayout`       NAME/tensor/FULL.NAME   trained tensors, as they were trained
metadata   s3distill.mask_bank = {"version", "backbone": {"checksum", "num_parameters"},
                                  "entries": {NAME: {"info", "symbols", "masks", "tensors", "digest"}}}
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from s3distill.masks.bits import pack_bits, packed_size, unpack_bits
from s3distill.masks.checksum import content_digest

HEADER_KEY = "s3distill.mask_bank"
VERSION = 1
AXES = ("full", "rows", "columns")

Identity = tuple[int, int, int] | None  # of a file: inode, time and size; None = there is no file


@dataclass(frozen=True)
class MaskLayout:
    """How one mask is stored.

    Attributes:
        shape: of the weight.
        axis: ``full`` = one bit per connection; ``rows`` / ``columns`` = one bit per output / input, where the mask is
            constant over the rest (patterns of these names).
    """

    shape: tuple[int, ...]
    axis: str = "full"

    @classmethod
    def of(cls, mask: Tensor, pattern: str = "unstructured") -> MaskLayout:
        """The smallest layout that gives the mask back exactly; on the meta device the pattern is believed."""
        layout = cls(tuple(mask.shape), pattern if pattern in AXES else "full")
        if layout.axis == "full" or mask.dim() < 2:
            return cls(tuple(mask.shape))
        if mask.is_meta or torch.equal(layout._reduced(mask).expand(mask.shape), mask):
            return layout
        return cls(tuple(mask.shape))

    @property
    def packed_shape(self) -> tuple[int, ...]:
        """Shape of the bits that are stored, one-sized where they count for a whole row or column."""
        keep = {"rows": (0,), "columns": (1,)}.get(self.axis, range(len(self.shape)))
        return tuple(size if i in keep else 1 for i, size in enumerate(self.shape))

    @property
    def num_bytes(self) -> int:
        return packed_size(math.prod(self.packed_shape))

    def pack(self, mask: Tensor) -> Tensor:
        """bool of ``shape`` -> uint8 [num_bytes]."""
        return pack_bits(self._reduced(mask))

    def unpack(self, packed: Tensor) -> Tensor:
        """uint8 [num_bytes] -> bool of ``shape``."""
        return unpack_bits(packed, self.packed_shape).expand(self.shape).contiguous()

    def _reduced(self, mask: Tensor) -> Tensor:
        index = tuple(slice(0, size) for size in self.packed_shape)
        return mask[index]


@dataclass(frozen=True)
class EntryHeader:
    """What the header says of one entry; ``digest`` is the SHA-256 of its stored tensors and of `facts`."""

    info: dict[str, Any]
    symbols: list[str] | None
    masks: dict[str, MaskLayout]
    tensors: list[str]
    digest: str = ""

    def facts(self) -> dict[str, Any]:
        """Everything but the digest, as values for JSON."""
        masks = {module: [list(layout.shape), layout.axis] for module, layout in self.masks.items()}
        return {"info": self.info, "symbols": self.symbols, "masks": masks, "tensors": self.tensors}

    def digest_of(self, tensors: Mapping[str, Tensor]) -> str:
        """What ``digest`` must be over these stored tensors."""
        return content_digest(tensors, json.dumps(self.facts(), sort_keys=True))

    def keys(self, name: str) -> list[str]:
        """Names of the entry's tensors in the file."""
        return [mask_key(name, m) for m in self.masks] + [tensor_key(name, t) for t in self.tensors]


@dataclass(frozen=True)
class Header:
    """The bank's header: the backbone that all entries belong to, and the entries by name."""

    checksum: str
    num_parameters: int
    entries: dict[str, EntryHeader] = field(default_factory=dict)

    def to_json(self) -> str:
        entries = {name: {**entry.facts(), "digest": entry.digest} for name, entry in self.entries.items()}
        backbone = {"checksum": self.checksum, "num_parameters": self.num_parameters}
        return json.dumps({"version": VERSION, "backbone": backbone, "entries": entries}, ensure_ascii=False)


def mask_key(name: str, module: str) -> str:
    return f"{name}/mask/{module}"


def tensor_key(name: str, tensor: str) -> str:
    return f"{name}/tensor/{tensor}"


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
            f"({path.stat().st_size} bytes; {error}); copy it again"
        ) from error
    if HEADER_KEY not in metadata:
        raise ValueError(
            f"{path} is no mask bank: its metadata must have the key {HEADER_KEY!r}, but has {sorted(metadata) or 'none'}; banks are made "
            "with `s3distill masks pack`"
        )
    with _damaged_header(path):
        values = json.loads(metadata[HEADER_KEY])
        version = int(values["version"])
    if version > VERSION:
        raise ValueError(
            f"mask bank {path} has format version {version}, but this s3distill reads versions up to {VERSION}; upgrade s3distill"
        )
    with _damaged_header(path):
        header = _parse_header(values)
    _check_tensors(handle, header, stored, path)
    return handle, header


@contextlib.contextmanager
def _damaged_header(path: Path) -> Iterator[None]:
    """Whatever a header that another program wrote fails with becomes one message."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, RecursionError, ValueError) as error:
        shown = f"the key {error} is missing" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"mask bank {path} has a damaged header ({shown}); take a copy of it, or pack it anew"
        ) from error


def _parse_header(values: Mapping[str, Any]) -> Header:
    entries = {}
    for name, entry in values["entries"].items():
        layouts = {m: MaskLayout(tuple(map(int, shape)), axis) for m, (shape, axis) in entry["masks"].items()}
        for layout in layouts.values():
            if layout.axis not in AXES:
                raise ValueError(f"unknown mask layout {layout.axis!r}")
        symbols = entry["symbols"]
        entries[str(name)] = EntryHeader(
            info=dict(entry["info"]),
            symbols=None if symbols is None else list(map(str, symbols)),
            masks=layouts,
            tensors=list(map(str, entry["tensors"])),
            digest=str(entry["digest"]),
        )
    backbone = values["backbone"]
    return Header(str(backbone["checksum"]), int(backbone["num_parameters"]), entries)


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


def write_bank(path: Path, header: Header, tensors: Mapping[str, Tensor], replaces: Identity) -> None:
    """Writes a bank to a temporary name and renames it, so that whatever happens the old file or the new one is there, whole.

    Args:
        replaces: the state of the file at ``path`` that ``tensors`` were read from; None = there is none.
    Raises:
        RuntimeError: another process has changed the file meanwhile; nothing is written.
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the user's umask has it: safetensors makes files for their owner alone
        try:
            safetensors.torch.save_file(dict(tensors), temporary, {HEADER_KEY: header.to_json()})
        except safetensors.SafetensorError as error:
            raise OSError(f"mask bank {path} cannot be written ({error}); what was there is unchanged") from error
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(mode)
        if identity(path) != replaces:
            raise RuntimeError(
                f"mask bank {path} must not change while it is written, but another process has just changed it; nothing was written: run "
                "the command again"
            )
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
