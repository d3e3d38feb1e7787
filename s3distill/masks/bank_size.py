"""What a mask bank costs in bytes, against a model of its own for every language."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from s3distill.masks.bank_header import MaskLayout

BYTES_OF_FLOAT32 = 4
BACKBONE_PREFIX = "w2v_model."  # trained tensors without it are no part of the backbone: the head


@dataclass(frozen=True)
class EntrySize:
    """Bytes of one entry: its packed masks, its trained tensors, and what its head takes in float32."""

    masks: int
    tensors: int
    head_float32: int

    @property
    def total(self) -> int:
        return self.masks + self.tensors


@dataclass(frozen=True)
class BankSize:
    """Bytes of backbone and bank, and of the separate models that they stand for.

    Attributes:
        backbone: the encoder's parameters in float32.
        entries: by name.
        header: everything in the bank's file that is no tensor.
    """

    backbone: int
    entries: dict[str, EntrySize]
    header: int = 0

    @property
    def bank(self) -> int:
        """Size of the bank's file."""
        return self.header + sum(entry.total for entry in self.entries.values())

    @property
    def total(self) -> int:
        return self.backbone + self.bank

    @property
    def separate(self) -> int:
        """A dense float32 model per entry: backbone and head."""
        return sum(self.backbone + entry.head_float32 for entry in self.entries.values())

    @property
    def saved(self) -> float:
        """Share of ``separate`` that is not needed; negative where the bank costs more, 0 for an empty one."""
        return 1 - self.total / self.separate if self.entries else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        masks = {
            name: {"mask_bytes": e.masks, "tensor_bytes": e.tensors, "bytes": e.total}
            for name, e in self.entries.items()
        }
        sums = {"backbone_bytes": self.backbone, "bank_bytes": self.bank, "header_bytes": self.header}
        return sums | {
            "masks": masks,
            "total_bytes": self.total,
            "separate_bytes": self.separate,
            "saved": self.saved,
        }


def entry_size(masks: Iterable[MaskLayout], tensors: Mapping[str, tuple[int, int]]) -> EntrySize:
    """Bytes of one entry.

    Args:
        tensors: trained tensors by full name -> (number of values, bytes of one).
    """
    head = sum(count for name, (count, _) in tensors.items() if not name.startswith(BACKBONE_PREFIX))
    return EntrySize(
        masks=sum(layout.num_bytes for layout in masks),
        tensors=sum(count * size for count, size in tensors.values()),
        head_float32=BYTES_OF_FLOAT32 * head,
    )


def bank_size(num_parameters: int, entries: Mapping[str, EntrySize], header: int = 0) -> BankSize:
    """Bytes of a bank over a backbone of ``num_parameters``; ``header`` as in `BankSize`."""
    return BankSize(BYTES_OF_FLOAT32 * num_parameters, dict(entries), header)
