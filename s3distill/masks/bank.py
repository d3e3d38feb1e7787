"""The mask bank: one file with what each language or task adds to a backbone that all of them share.

An entry is the masks of one trained run, bit-packed, with its head, its dictionary and whatever else it trained. The
backbone itself is not in the file; its checksum is, so that masks never meet other weights than those they were learned over.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from s3distill.masks.bank_checks import WEIGHTS_DTYPES, check_name
from s3distill.masks.bank_entry import BankEntry, stored_form
from s3distill.masks.bank_file import identity, read_bank, write_bank
from s3distill.masks.bank_header import EntryHeader, Header, MaskLayout, mask_key, tensor_key
from s3distill.masks.bank_size import BankSize, bank_size, entry_size

__all__ = ["WEIGHTS_DTYPES", "BankEntry", "MaskBank", "check_name"]


class MaskBank:
    """A bank's file; masks and tensors are read when they are asked for.

    `add` and `remove` write the whole file anew under a temporary name and rename it: a reader, or a kill, sees the old
    bank or the new one. Make one with `open` or `create`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reopen()

    def _reopen(self) -> None:
        self._identity = identity(self.path)  # before reading: a change in between is then noticed when writing
        self._handle, self._header = read_bank(self.path)
        self._intact: set[str] = set()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> MaskBank:
        """Opens a bank.

        Raises:
            FileNotFoundError, ValueError: see `bank_file.read_bank`.
        """
        return cls(Path(os.path.realpath(path)))  # writing through a link must not replace the link

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], checksum: str, num_parameters: int, entries: Sequence[BankEntry] = ()
    ) -> MaskBank:
        """Makes a new bank.

        Args:
            checksum: of the backbone, see `backbone_checksum`.
            num_parameters: of the backbone's encoder, for `size`.
        Raises:
            ValueError: the file is there already, two entries share a name, or a mask is larger than the backbone.
            RuntimeError: another process has just made the file.
        """
        target = Path(os.path.realpath(path))
        if target.exists():
            raise ValueError(
                f"{path} must not be there yet, since a bank is never overwritten; remove it, or take another name"
            )
        header, tensors = Header(checksum, num_parameters), dict[str, Tensor]()
        for entry in entries:
            _refuse_duplicate(entry.name, header, target)
            added, stored = stored_form(entry)
            header = dataclasses.replace(header, entries={**header.entries, entry.name: added})
            tensors |= stored
        write_bank(target, header, tensors, replaces=None)
        return cls(target)

    @property
    def checksum(self) -> str:
        """Of the backbone that all entries belong to."""
        return self._header.checksum

    @property
    def num_parameters(self) -> int:
        """Of the backbone's encoder."""
        return self._header.num_parameters

    @property
    def names(self) -> list[str]:
        """Names of the entries, in the order in which they came."""
        return list(self._header.entries)

    def check_backbone(self, checksum: str, source: str = "the backbone") -> None:
        """Refuses other weights than those that the masks were learned over (`ValueError`)."""
        if checksum != self.checksum:
            raise ValueError(
                f"mask bank {self.path} belongs to the backbone with checksum {self.checksum[:12]}, but {source} has "
                f"{checksum[:12]}: masks mean nothing over other weights; pass the checkpoint that its runs had as model.w2v_path"
            )

    def info(self, name: str) -> dict[str, Any]:
        """See `BankEntry.info`; ValueError for a name that is not in the bank, as in all methods that take one."""
        return dict(self._entry(name).info)

    def symbols(self, name: str) -> list[str] | None:
        """Dictionary of the entry's head, index = position, or None."""
        symbols = self._entry(name).symbols
        return None if symbols is None else list(symbols)

    def module_names(self, name: str) -> list[str]:
        """The entry's masked modules."""
        return list(self._entry(name).masks)

    def mask_shape(self, name: str, module: str) -> tuple[int, ...]:
        """Shape of one mask, from the header."""
        return self._layout(name, module).shape

    def mask(self, name: str, module: str) -> Tensor:
        """One mask, bool of its weight's shape; only its own bytes are read."""
        layout = self._layout(name, module)
        return layout.unpack(self._handle.get_tensor(mask_key(name, module)))

    def tensor_names(self, name: str) -> list[str]:
        """Full names of the entry's trained tensors."""
        return list(self._entry(name).tensors)

    def tensor(self, name: str, tensor: str) -> Tensor:
        """One trained tensor, in the type it was trained in."""
        self._require_tensor(name, tensor)
        return self._handle.get_tensor(tensor_key(name, tensor)).clone()  # type: ignore[no-any-return]

    def tensor_shape(self, name: str, tensor: str) -> tuple[int, ...]:
        """Shape of one trained tensor; its values are not read."""
        self._require_tensor(name, tensor)
        return tuple(self._handle.get_slice(tensor_key(name, tensor)).get_shape())

    def check_intact(self, name: str) -> None:
        """Refuses an entry whose bytes are not those that were packed (`ValueError`); reads them once per opening."""
        if name not in self._intact and not self._matches_digest(name):
            raise ValueError(
                f"{name!r} in mask bank {self.path} is damaged: its bytes must be those that were packed, but are not; take a copy of "
                "the bank, or pack the entry anew"
            )
        self._intact.add(name)

    def entry(self, name: str) -> BankEntry:
        """A whole entry; `ValueError` where it is damaged, so that damage never gets a digest of its own."""
        self.check_intact(name)
        return BankEntry(
            name=name,
            masks={module: self.mask(name, module) for module in self.module_names(name)},
            tensors={tensor: self.tensor(name, tensor) for tensor in self.tensor_names(name)},
            symbols=self.symbols(name),
            info=self.info(name),
        )

    def refuse_duplicate(self, name: str) -> None:
        """ValueError where an entry of that name is there already."""
        _refuse_duplicate(name, self._header, self.path)

    def add(self, entry: BankEntry) -> None:
        """Adds an entry; the file is replaced.

        Raises:
            ValueError: an entry of that name is there already.
            RuntimeError: another process has changed the file since it was opened.
        """
        self.refuse_duplicate(entry.name)
        header, tensors = stored_form(entry)
        self._write({**self._header.entries, entry.name: header}, tensors)

    def remove(self, name: str) -> None:
        """Removes an entry; the file is replaced. Raises as `add` does."""
        self._entry(name)
        self._write({n: e for n, e in self._header.entries.items() if n != name}, {})

    def extract(self, name: str, path: str | os.PathLike[str]) -> MaskBank:
        """Makes a new bank with that entry alone."""
        return MaskBank.create(path, self.checksum, self.num_parameters, [self.entry(name)])

    def damaged_entries(self) -> Iterator[str]:
        """Reads everything; gives the names of entries whose bytes are not those that were packed."""
        yield from (name for name in self.names if not self._matches_digest(name))

    def size(self) -> BankSize:
        """Bytes of the bank, per entry and against separate models."""
        sizes = {}
        for name, header in self._header.entries.items():
            tensors = {t: self._handle.get_tensor(tensor_key(name, t)) for t in header.tensors}
            sizes[name] = entry_size(
                header.masks.values(), {n: (t.numel(), t.element_size()) for n, t in tensors.items()}
            )
        assert self._identity is not None
        stored = sum(size.total for size in sizes.values())
        return bank_size(self.num_parameters, sizes, header=self._identity[2] - stored)

    def _matches_digest(self, name: str) -> bool:
        entry = self._entry(name)
        return entry.digest_of({key: self._handle.get_tensor(key) for key in entry.keys(name)}) == entry.digest

    def _entry(self, name: str) -> EntryHeader:
        if name not in self._header.entries:
            raise ValueError(f"mask bank {self.path} has no {name!r}; it has {', '.join(self.names) or 'no entries'}")
        return self._header.entries[name]

    def _layout(self, name: str, module: str) -> MaskLayout:
        masks = self._entry(name).masks
        if module not in masks:
            raise ValueError(
                f"{name!r} in mask bank {self.path} has no mask for {module!r}; it masks {len(masks)} modules: "
                f"{', '.join(list(masks)[:4])}, ..."
            )
        return masks[module]

    def _require_tensor(self, name: str, tensor: str) -> None:
        if tensor not in self._entry(name).tensors:
            raise ValueError(f"{name!r} in mask bank {self.path} has no trained tensor {tensor!r}")

    def _write(self, entries: dict[str, EntryHeader], added: dict[str, Tensor]) -> None:
        """Replaces the file by one with these entries, of which all but the ``added`` tensors are in the present one."""
        kept = {key for name, entry in entries.items() for key in entry.keys(name)} - set(added)
        tensors = {key: self._handle.get_tensor(key) for key in kept} | added
        write_bank(self.path, dataclasses.replace(self._header, entries=entries), tensors, self._identity)
        self._reopen()


def _refuse_duplicate(name: str, header: Header, path: Path) -> None:
    if name in header.entries:
        raise ValueError(
            f"mask bank {path} has {name!r} already, and an entry is never overwritten; take another --name, or first: s3distill masks "
            f"remove --bank {path} --name {name}"
        )
