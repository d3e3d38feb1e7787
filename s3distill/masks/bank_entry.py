"""One entry of a mask bank: what a run adds to the backbone, before it is packed."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from s3distill.masks.bank_checks import check_head, check_info, check_name
from s3distill.masks.bank_header import EntryHeader, MaskLayout, mask_key, tensor_key
from s3distill.masks.bank_size import EntrySize, entry_size


@dataclass(frozen=True)
class BankEntry:
    """What one run adds to the backbone.

    Names are fairseq's below ``w2v_encoder``: modules ``w2v_model.encoder.layers.0.fc1``, ``proj``, ...; tensors the same with
    ``.weight`` and so on.

    Attributes:
        name: of the language or task: letters, digits, ``.``, ``_``, ``-``.
        masks: module -> bool of its weight's shape, True = kept.
        tensors: every other trained tensor that differs from the backbone's, and the head, by full name.
        symbols: dictionary of the head (index = position), or None.
        info: values for JSON: ``density``, ``pattern``, ``labels``, ``normalize``, ``date``, ``source``, ``kind`` (``ctc`` or
            ``classification``) and ``weights_dtype``, the type that the run rounded the backbone's weights to.
    """

    name: str
    masks: dict[str, Tensor]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    symbols: list[str] | None = None
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name(self.name)
        wrong = [module for module, mask in self.masks.items() if mask.dtype != torch.bool]
        if wrong:
            raise ValueError(f"masks must be bool, but those of {', '.join(wrong[:3])} in {self.name!r} are not")
        if not self.masks and not self.tensors:
            raise ValueError(f"an entry must have masks or trained tensors, but {self.name!r} has neither")
        foreign = [name for name, tensor in self.tensors.items() if not tensor.dtype.is_floating_point]
        if foreign:
            raise ValueError(
                f"trained tensors must be floating point, but {', '.join(foreign[:3])} in {self.name!r} are not"
            )
        try:
            json.dumps(self.info)
        except (TypeError, ValueError) as error:
            raise ValueError(f"`info` of {self.name!r} must hold values for JSON ({error})") from error
        try:
            check_info(self.info)
        except ValueError as error:
            raise ValueError(f"{error} (in {self.name!r})") from error
        check_head(self.name, self.symbols, self.masks, {name: t.shape for name, t in self.tensors.items()})

    def layouts(self) -> dict[str, MaskLayout]:
        """How the masks are stored: for the patterns rows and columns one bit per row or column."""
        pattern = str(self.info.get("pattern", "unstructured"))
        return {module: MaskLayout.of(mask, pattern) for module, mask in self.masks.items()}

    def size(self) -> EntrySize:
        """Bytes that it takes in a bank; tensors on the meta device will do."""
        return entry_size(self.layouts().values(), {n: (t.numel(), t.element_size()) for n, t in self.tensors.items()})


def stored_form(entry: BankEntry) -> tuple[EntryHeader, dict[str, Tensor]]:
    """Header and tensors of an entry as they stand in the file."""
    layouts = entry.layouts()
    tensors = {mask_key(entry.name, m): layouts[m].pack(mask) for m, mask in entry.masks.items()}
    for name, tensor in entry.tensors.items():
        tensors[tensor_key(entry.name, name)] = (
            tensor.detach().cpu().contiguous().clone()
        )  # no shared memory in the file
    header = EntryHeader(dict(entry.info), entry.symbols, layouts, list(entry.tensors))
    return dataclasses.replace(header, digest=header.digest_of(tensors)), tensors
