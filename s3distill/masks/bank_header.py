"""The mask bank's header: what a bank says of itself, checked as something that a stranger wrote.

{"version", "backbone": {"checksum", "num_parameters"}, "entries": {NAME: {"info", "symbols", "masks", "tensors", "digest"}}}
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from s3distill.masks.bank_checks import (
    MODULE_NAME,
    TENSOR_NAME,
    check_digest,
    check_info,
    check_name,
    check_names,
    is_count,
    is_texts,
)
from s3distill.masks.bits import pack_bits, packed_size, unpack_bits
from s3distill.masks.checksum import content_digest
from s3distill.masks.options import HEAD

VERSION = 1
AXES = ("full", "rows", "columns")
_MAX_DIMS = 3  # Linear [out, in], convolutions [out, in, kernel]


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

    def __post_init__(self) -> None:
        fewest = 1 if self.axis == "full" else 2
        if self.axis not in AXES:
            raise ValueError(f"unknown mask layout {self.axis!r}; there are {', '.join(AXES)}")
        if not fewest <= len(self.shape) <= _MAX_DIMS or not all(is_count(size) and size > 0 for size in self.shape):
            raise ValueError(
                f"the shape of a mask must be {fewest} to {_MAX_DIMS} positive sizes, but is {list(self.shape)!r}"
            )

    @classmethod
    def of(cls, mask: Tensor, pattern: str = "unstructured") -> MaskLayout:
        """The smallest layout that gives the mask back exactly; on the meta device the pattern is believed."""
        if mask.dim() < 2 or pattern not in AXES:
            return cls(tuple(mask.shape))
        layout = cls(tuple(mask.shape), pattern)
        if mask.is_meta or torch.equal(layout._reduced(mask).expand(mask.shape), mask):
            return layout
        return cls(tuple(mask.shape))

    @property
    def packed_shape(self) -> tuple[int, ...]:
        """Shape of the bits that are stored, one-sized where they count for a whole row or column."""
        keep = {"rows": (0,), "columns": (1,)}.get(self.axis, range(len(self.shape)))
        return tuple(size if i in keep else 1 for i, size in enumerate(self.shape))

    @property
    def num_values(self) -> int:
        """Connections that it lies over."""
        return math.prod(self.shape)

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
    """What the header says of one entry; ``digest`` is the SHA-256 of its stored tensors and of `facts`.

    Raises:
        ValueError: a name or a value is not what it must be.
    """

    info: dict[str, Any]
    symbols: list[str] | None
    masks: dict[str, MaskLayout]
    tensors: list[str]
    digest: str = ""

    def __post_init__(self) -> None:
        check_info(self.info)
        if self.symbols is not None and not is_texts(self.symbols):
            raise ValueError("the symbols of an entry must be a list of texts, or null")
        check_names("masked modules", list(self.masks), MODULE_NAME)
        check_names("trained tensors", self.tensors, TENSOR_NAME)

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
    """The bank's header: the backbone that all entries belong to, and the entries by name.

    Raises:
        ValueError: a name or a value is not what it must be, or a mask is larger than the backbone.
    """

    checksum: str
    num_parameters: int
    entries: dict[str, EntryHeader] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_digest("the backbone's checksum", self.checksum)
        if not is_count(self.num_parameters):
            raise ValueError(
                f"the backbone's `num_parameters` must be a count, 0 or more, but is {self.num_parameters!r}"
            )
        for name, entry in self.entries.items():
            check_name(name)
            for module, layout in entry.masks.items():
                # the head is no part of the backbone: its mask has to fit its weight
                if layout.num_values > self.num_parameters and not (
                    module == HEAD and f"{HEAD}.weight" in entry.tensors
                ):
                    raise ValueError(
                        f"the mask of {module} in {name!r} must not be larger than the backbone, which has {self.num_parameters} "
                        f"parameters, but has the shape {layout.shape}"
                    )

    def to_json(self) -> str:
        entries = {name: {**entry.facts(), "digest": entry.digest} for name, entry in self.entries.items()}
        backbone = {"checksum": self.checksum, "num_parameters": self.num_parameters}
        return json.dumps({"version": VERSION, "backbone": backbone, "entries": entries}, ensure_ascii=False)


def parse_header(values: Mapping[str, Any]) -> Header:
    """The header from its JSON values.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is not what `Header.to_json` writes.
    """
    json.dumps(values, ensure_ascii=False).encode()  # half of a surrogate pair is no text: nothing could print it
    entries = {}
    for name, entry in values["entries"].items():
        masks = {module: MaskLayout(tuple(shape), axis) for module, (shape, axis) in entry["masks"].items()}
        info, symbols, tensors, digest = (entry[key] for key in ("info", "symbols", "tensors", "digest"))
        check_digest(f"the digest of {name!r}", digest)
        entries[name] = EntryHeader(info, symbols, masks, tensors, digest)
    backbone = values["backbone"]
    return Header(backbone["checksum"], backbone["num_parameters"], entries)


def mask_key(name: str, module: str) -> str:
    return f"{name}/mask/{module}"


def tensor_key(name: str, tensor: str) -> str:
    return f"{name}/tensor/{tensor}"
