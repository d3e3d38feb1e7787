"""The mask bank's file: what goes in comes out, what is wrong is refused, and nothing is ever lost."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s3distill.encoder.config import EncoderConfig, parse_conv_layers, uniform_layers
from s3distill.encoder.model import SpeechEncoder
from s3distill.masks import bank_file
from s3distill.masks.bank import BankEntry, MaskBank
from s3distill.masks.bank_file import HEADER_KEY
from s3distill.masks.bank_header import MaskLayout
from s3distill.masks.bank_size import bank_size
from s3distill.masks.checksum import backbone_checksum
from tests.masks.banks import FFN, KINDS, NUM_PARAMETERS, SYMBOLS, make_backbone, make_entry

CHECKSUM = "ab" * 32


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bank.safetensors"


@pytest.fixture
def bank(path: Path) -> MaskBank:
    """Entries nl and fr."""
    bank = MaskBank.create(path, CHECKSUM, NUM_PARAMETERS, [make_entry("nl", seed=1)])
    bank.add(make_entry("fr", seed=2, modules=KINDS, trained=("mask_emb", "layer_norm.weight"), density=0.9))
    return bank


def assert_same(one: BankEntry, other: BankEntry) -> None:
    assert (one.name, one.symbols, one.info) == (other.name, other.symbols, other.info)
    for mine, theirs in ((one.masks, other.masks), (one.tensors, other.tensors)):
        assert list(mine) == list(theirs)
        for name, tensor in mine.items():
            assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


# --- what goes in comes out


def test_entries_come_back_as_they_were(bank: MaskBank, path: Path) -> None:
    for opened in (bank, MaskBank.open(path)):
        assert opened.names == ["nl", "fr"] and opened.checksum == CHECKSUM and opened.num_parameters == NUM_PARAMETERS
        assert_same(opened.entry("nl"), make_entry("nl", seed=1))
        trained = ("mask_emb", "layer_norm.weight")
        assert_same(opened.entry("fr"), make_entry("fr", seed=2, modules=KINDS, trained=trained, density=0.9))


@settings(deadline=None)
@given(
    st.sampled_from(["unstructured", "2:4", "rows", "columns"]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.integers(0, 1000),
)
def test_every_pattern_and_type_comes_back(pattern: str, dtype: torch.dtype, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        entry = make_entry("nl", seed, modules=KINDS, dtype=dtype, pattern=pattern)
        bank = MaskBank.create(Path(folder) / "bank.safetensors", CHECKSUM, NUM_PARAMETERS, [entry])
        assert_same(bank.entry("nl"), entry)
        assert list(bank.damaged_entries()) == []


def test_rows_and_columns_take_one_bit_each(path: Path) -> None:
    entries = [make_entry(p, pattern=p) for p in ("unstructured", "rows", "columns")]
    size = MaskBank.create(path, CHECKSUM, NUM_PARAMETERS, entries).size()
    # fc1 [24, 16] and fc2 [16, 24] in two layers
    assert size.entries["unstructured"].masks == 2 * (24 * 16 // 8) * 2
    assert size.entries["rows"].masks == 2 * (24 // 8 + 16 // 8)
    assert size.entries["columns"].masks == 2 * (16 // 8 + 24 // 8)


def test_a_mask_that_breaks_its_pattern_is_stored_whole() -> None:
    entry = make_entry("nl", pattern="rows")
    mask = entry.masks[FFN[0]].clone()
    mask[3, 5] = ~mask[3, 5]
    layout = MaskLayout.of(mask, "rows")
    assert layout.axis == "full" and torch.equal(layout.unpack(layout.pack(mask)), mask)


def test_tensors_that_share_memory_are_stored(path: Path) -> None:
    entry = make_entry("nl")
    shared = torch.randn(8, 4)
    entry.tensors["w2v_model.one"], entry.tensors["w2v_model.two"] = shared[:, 1], shared.T
    bank = MaskBank.create(path, CHECKSUM, NUM_PARAMETERS, [entry])
    assert torch.equal(bank.tensor("nl", "w2v_model.one"), shared[:, 1])
    assert torch.equal(bank.tensor("nl", "w2v_model.two"), shared.T)


def test_what_a_bank_gives_can_be_changed_without_changing_the_bank(bank: MaskBank) -> None:
    before = bank.entry("nl")
    bank.mask("nl", FFN[0]).fill_(True)
    bank.tensor("nl", "proj.weight").fill_(0)
    bank.info("nl")["density"] = 0
    bank.names.clear()
    symbols = bank.symbols("nl")
    assert symbols is not None
    symbols.clear()
    assert_same(bank.entry("nl"), before)


def test_one_mask_reads_one_tensor(bank: MaskBank) -> None:
    asked = []
    handle = bank._handle
    bank._handle = type("Spy", (), {"get_tensor": lambda _, key: asked.append(key) or handle.get_tensor(key)})()
    assert bank.module_names("fr") == list(KINDS)
    assert bank.mask("fr", FFN[1]).shape == bank.mask_shape("fr", FFN[1]) == (16, 24)
    assert asked == [f"fr/mask/{FFN[1]}"]


def test_the_same_entries_give_the_same_bytes(tmp_path: Path) -> None:
    files = [tmp_path / "one", tmp_path / "two"]
    for file in files:
        MaskBank.create(file, CHECKSUM, NUM_PARAMETERS, [make_entry("nl"), make_entry("fr", seed=2)])
    assert files[0].read_bytes() == files[1].read_bytes()


# --- adding, removing, extracting


def test_removing_leaves_the_rest(bank: MaskBank, path: Path) -> None:
    fr = bank.entry("fr")
    bank.remove("nl")
    for opened in (bank, MaskBank.open(path)):
        assert opened.names == ["fr"]
        assert_same(opened.entry("fr"), fr)
    bank.remove("fr")
    assert MaskBank.open(path).names == [] and bank.size().saved == 0
    bank.add(fr)
    assert_same(MaskBank.open(path).entry("fr"), fr)


def test_a_removed_name_can_be_taken_again(bank: MaskBank) -> None:
    bank.remove("nl")
    bank.add(make_entry("nl", seed=9))
    assert bank.names == ["fr", "nl"]
    assert_same(bank.entry("nl"), make_entry("nl", seed=9))


def test_extracting_makes_a_bank_of_one(bank: MaskBank, tmp_path: Path) -> None:
    before = bank.path.read_bytes()
    alone = bank.extract("fr", tmp_path / "new" / "fr.safetensors")
    assert alone.names == ["fr"] and alone.checksum == CHECKSUM and alone.num_parameters == NUM_PARAMETERS
    assert_same(alone.entry("fr"), bank.entry("fr"))
    assert bank.path.read_bytes() == before


def test_a_link_to_a_bank_stays_a_link(bank: MaskBank, tmp_path: Path) -> None:
    link = tmp_path / "link.safetensors"
    link.symlink_to(bank.path)
    MaskBank.open(link).remove("nl")
    assert link.is_symlink() and MaskBank.open(bank.path).names == ["fr"]


# --- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda b: b.add(make_entry("nl", seed=5)),
            r"has 'nl' already, and an entry is never overwritten; .*masks remove",
        ),
        (lambda b: b.remove("de"), r"has no 'de'; it has nl, fr$"),
        (lambda b: b.extract("de", b.path.with_name("de.safetensors")), r"has no 'de'; it has nl, fr$"),
        (lambda b: b.extract("nl", b.path), r"must not be there yet, since a bank is never overwritten"),
        (lambda b: MaskBank.create(b.path, CHECKSUM, 1), r"must not be there yet"),
        (lambda b: b.entry("NL"), r"has no 'NL'"),
        (lambda b: b.mask("nl", "proj"), r"'nl' in mask bank .* has no mask for 'proj'; it masks 4 modules"),
        (lambda b: b.tensor("nl", "proj.scale"), r"has no trained tensor 'proj\.scale'"),
        (
            lambda b: b.check_backbone("cd" * 32, "xlsr.pt"),
            r"belongs to the backbone with checksum abab.*xlsr\.pt has cdcd",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_and_changes_nothing(
    change: Callable[[MaskBank], Any], message: str, bank: MaskBank
) -> None:
    before, files = bank.path.read_bytes(), sorted(os.listdir(bank.path.parent))
    with pytest.raises(ValueError, match=message):
        change(bank)
    assert bank.path.read_bytes() == before and sorted(os.listdir(bank.path.parent)) == files
    assert bank.names == ["nl", "fr"]


def test_two_new_entries_of_one_name_are_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="has 'nl' already"):
        MaskBank.create(path, CHECKSUM, NUM_PARAMETERS, [make_entry("nl"), make_entry("nl", seed=2)])
    assert not path.exists()


@pytest.mark.parametrize("name", ["", " ", "a b", "../up", "a/b", "-x", ".", "nl\n", "é", "a\0b", "nl/mask/x"])
def test_odd_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"a name in a mask bank must begin with a letter or digit"):
        dataclasses.replace(make_entry(), name=name)


@pytest.mark.parametrize("name", ["nl", "zh-CN", "x_1.2", "0", "a..b"])
def test_plain_names_are_taken(name: str, path: Path) -> None:
    assert MaskBank.create(path, CHECKSUM, NUM_PARAMETERS, [make_entry(name)]).names == [name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masks": {FFN[0]: torch.ones(24, 16)}}, r"masks must be bool, but those of w2v_model.*fc1 in 'nl' are not"),
        ({"masks": {}, "tensors": {}}, r"must have masks or trained tensors, but 'nl' has neither"),
        ({"symbols": SYMBOLS[:-1]}, r"an output for each of its 6 symbols, but has 7"),
        ({"info": {"weights_dtype": "int8"}}, r"`weights_dtype` must be one of float32, .*but is 'int8'"),
        ({"info": {"density": torch.ones(1)}}, r"`info` of 'nl' must hold values for JSON"),
    ],
)
def test_entries_that_mean_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(make_entry(), **changes)


# --- damaged files


def test_a_file_that_was_cut_off_is_refused_at_every_length(bank: MaskBank, tmp_path: Path) -> None:
    contents = bank.path.read_bytes()
    (header_size,) = struct.unpack("<Q", contents[:8])
    lengths = [
        0,
        1,
        7,
        8,
        9,
        header_size // 2,
        8 + header_size - 1,
        8 + header_size,
        8 + header_size + 1,
        len(contents) - 1,
    ]
    broken = tmp_path / "broken.safetensors"
    for length in lengths:
        broken.write_bytes(contents[:length])
        with pytest.raises(
            ValueError, match=rf"truncated, damaged or something else \({length} bytes; .*copy it again"
        ):
            MaskBank.open(broken)
        assert broken.read_bytes() == contents[:length]
    broken.write_bytes(contents + b"\0")
    with pytest.raises(ValueError, match="truncated, damaged or something else"):
        MaskBank.open(broken)
    broken.write_bytes(contents)
    assert MaskBank.open(broken).names == ["nl", "fr"]


def test_what_is_no_bank_is_refused(path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"does not exist; check the path, or make it with `s3distill masks pack`"
    ):
        MaskBank.open(path)
    torch.save({"model": {}}, path)
    with pytest.raises(
        ValueError, match=r"must be a whole safetensors file, but is truncated, damaged or something else"
    ):
        MaskBank.open(path)
    safetensors.torch.save_file({"a": torch.ones(2)}, path, {"format": "pt"})
    with pytest.raises(
        ValueError, match=rf"is no mask bank: its metadata must have the key '{HEADER_KEY}', but has \['format'\]"
    ):
        MaskBank.open(path)


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]) -> None:
    """Writes the file again with another header or other tensors, as a foreign program might."""
    with safetensors.safe_open(path, framework="pt") as handle:
        header = json.loads(handle.metadata()[HEADER_KEY])
        tensors = {key: handle.get_tensor(key).clone() for key in handle.keys()}  # noqa: SIM118  no mapping
    text = change(header, tensors)
    safetensors.torch.save_file(tensors, path, {HEADER_KEY: text if isinstance(text, str) else json.dumps(header)})


def test_an_untouched_rewrite_is_read(bank: MaskBank) -> None:
    rewrite(bank.path, lambda header, tensors: None)
    assert MaskBank.open(bank.path).names == ["nl", "fr"]


@pytest.mark.parametrize(
    "keys",
    [
        ("version",),
        ("backbone",),
        ("entries",),
        ("backbone", "checksum"),
        ("backbone", "num_parameters"),
        *(("entries", "nl", key) for key in ("info", "symbols", "masks", "tensors", "digest")),
    ],
)
def test_a_missing_key_of_the_header_is_named(keys: tuple[str, ...], bank: MaskBank) -> None:
    def drop(header: dict[str, Any], _: Any) -> None:
        for key in keys[:-1]:
            header = header[key]
        del header[keys[-1]]

    rewrite(bank.path, drop)
    with pytest.raises(
        ValueError, match=rf"has a damaged header \(the key '{keys[-1]}' is missing\); take a copy of it"
    ):
        MaskBank.open(bank.path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, t: h.update(version=2), r"has format version 2, but this s3distill reads versions up to 1; upgrade"),
        (lambda h, t: h.update(version="x"), r"has a damaged header \(ValueError"),
        (lambda h, t: "{", r"has a damaged header \(JSONDecodeError"),
        (lambda h, t: "[" * 100_000, r"has a damaged header \(RecursionError"),
        (lambda h, t: "[1]", r"has a damaged header \(TypeError"),
        (
            lambda h, t: h["entries"]["nl"]["masks"].update({FFN[0]: [[24, 16], "diagonal"]}),
            r"unknown mask layout 'diagonal'",
        ),
        (lambda h, t: h["entries"]["nl"]["masks"].update({FFN[0]: [["x"], "full"]}), r"has a damaged header"),
        (
            lambda h, t: h["entries"]["nl"]["masks"].update({FFN[0]: [[24, 17], "full"]}),
            r"must have 51 bytes for the shape",
        ),
        (
            lambda h, t: h["entries"]["nl"]["masks"].update({FFN[0]: [[24, 16], "rows"]}),
            r"must have 3 bytes for the shape",
        ),
        (
            lambda h, t: t.update({f"nl/mask/{FFN[0]}": torch.zeros(48)}),
            r"must have 48 bytes .*but has \[48\] of type F32",
        ),
        (lambda h, t: h["entries"]["nl"]["masks"].pop(FFN[0]), r"without a name \['nl/mask/.*fc1'\]"),
        (lambda h, t: h["entries"].pop("nl"), r"without a name \['nl/mask/"),
        (lambda h, t: t.pop("nl/tensor/proj.weight"), r"without a tensor are \['nl/tensor/proj\.weight'\]"),
    ],
)
def test_a_header_that_is_wrong_is_refused(change: Callable[..., Any], message: str, bank: MaskBank) -> None:
    rewrite(bank.path, change)
    with pytest.raises(ValueError, match=message):
        MaskBank.open(bank.path)


def test_changed_bytes_are_found_and_named(bank: MaskBank) -> None:
    assert list(bank.damaged_entries()) == []

    def flip(_: Any, tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"fr/mask/{FFN[2]}"][7] ^= 4

    rewrite(bank.path, flip)
    assert list(MaskBank.open(bank.path).damaged_entries()) == ["fr"]
    bank = MaskBank.open(bank.path)
    bank.remove("fr")
    rewrite(bank.path, lambda header, _: header["entries"]["nl"]["symbols"].reverse())
    assert list(MaskBank.open(bank.path).damaged_entries()) == ["nl"]


# --- writing in one step

_KILLED = """
import os, sys
from s3distill.masks.bank import MaskBank
bank = MaskBank.open(sys.argv[1])
os.replace = lambda *_: os._exit(9)
bank.remove("nl")
"""


def test_a_kill_between_writing_and_renaming_leaves_the_old_bank(bank: MaskBank, tmp_path: Path) -> None:
    before = bank.path.read_bytes()
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", _KILLED, bank.path], cwd=root, check=False)
    assert done.returncode == 9, "it was killed where it should have renamed"
    left = [file for file in tmp_path.iterdir() if file != bank.path]
    assert len(left) == 1 and MaskBank.open(left[0]).names == ["fr"], "the new bank was whole already"
    assert bank.path.read_bytes() == before
    bank.remove("fr")  # what the killed process left is in nobody's way
    assert MaskBank.open(bank.path).names == ["nl"]


@pytest.mark.parametrize(
    ("function", "error", "expected"),
    [
        ((bank_file.os, "replace"), KeyboardInterrupt(), KeyboardInterrupt),
        ((bank_file.os, "fsync"), OSError(28, "No space left on device"), OSError),
        ((safetensors.torch, "save_file"), safetensors.SafetensorError("I/O error: no space"), OSError),
    ],
)
def test_a_failed_write_leaves_the_old_bank_and_no_litter(
    function: tuple[Any, str],
    error: BaseException,
    expected: type[BaseException],
    bank: MaskBank,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    before = bank.path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(*function, fail)
        with pytest.raises(expected):
            bank.add(make_entry("de"))
    assert bank.path.read_bytes() == before and os.listdir(bank.path.parent) == [bank.path.name]
    bank.add(make_entry("de"))
    assert MaskBank.open(bank.path).names == ["nl", "fr", "de"]


def test_what_another_process_adds_meanwhile_is_not_lost(bank: MaskBank) -> None:
    other = MaskBank.open(bank.path)
    other.add(make_entry("de"))
    for change in (lambda: bank.add(make_entry("it")), lambda: bank.remove("nl")):
        with pytest.raises(
            RuntimeError, match=r"another process has just changed it; nothing was written: run the command again"
        ):
            change()
    assert MaskBank.open(bank.path).names == ["nl", "fr", "de"]


def test_a_bank_that_appears_meanwhile_is_not_overwritten(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = safetensors.torch.save_file

    def slow_save(tensors: Any, file: Any, metadata: Any) -> None:
        save(tensors, file, metadata)
        monkeypatch.undo()
        MaskBank.create(path, CHECKSUM, NUM_PARAMETERS, [make_entry("fr")])

    monkeypatch.setattr(safetensors.torch, "save_file", slow_save)
    with pytest.raises(RuntimeError, match="another process has just changed it"):
        MaskBank.create(path, CHECKSUM, NUM_PARAMETERS, [make_entry("nl")])
    assert MaskBank.open(path).names == ["fr"]


# --- the backbone's name


def test_the_checksum_is_of_names_shapes_and_values() -> None:
    state = make_backbone().encoder_state
    checksum = backbone_checksum(state)
    assert (
        checksum
        == backbone_checksum(dict(reversed(state.items())))
        != backbone_checksum(make_backbone(1).encoder_state)
    )
    # it stands in files, so it must never change
    written = b"a\x002x2\x00" + struct.pack("<4f", 1, 0, 0, 1) + b"b\x002\x00" + struct.pack("<2f", 1, -2)
    assert backbone_checksum({"b": torch.tensor([1.0, -2.0]), "a": torch.eye(2)}) == hashlib.sha256(written).hexdigest()
    for key in ("mask_emb", "encoder.layers.1.fc2.weight", "encoder.pos_conv.0.weight_g"):
        changed = {**state, key: state[key].clone()}
        changed[key].view(-1)[-1] = torch.nextafter(changed[key].view(-1)[-1], torch.tensor(9.0))
        assert backbone_checksum(changed) != checksum
        assert backbone_checksum({k: v for k, v in state.items() if k != key}) != checksum
        assert backbone_checksum({(f"{k}2" if k == key else k): v for k, v in state.items()}) != checksum
    weight = "encoder.layers.0.fc1.weight"
    assert backbone_checksum({**state, weight: state[weight].view(16, 24)}) != checksum


def test_a_file_that_was_saved_again_has_the_same_checksum(tmp_path: Path) -> None:
    state = make_backbone().encoder_state
    torch.save({k: v.T.contiguous().T if v.dim() == 2 else v for k, v in state.items()}, tmp_path / "again.pt")
    assert backbone_checksum(torch.load(tmp_path / "again.pt")) == backbone_checksum(state)
    half = {k: v.half() for k, v in state.items()}
    assert backbone_checksum(half) == backbone_checksum({k: v.float() for k, v in half.items()})


# --- bytes


def test_the_accounting_is_the_size_of_the_file(bank: MaskBank) -> None:
    size = bank.size()
    assert size.bank == os.path.getsize(bank.path)
    (header_size,) = struct.unpack("<Q", bank.path.read_bytes()[:8])
    assert size.header == 8 + header_size
    for name in bank.names:
        entry = bank.entry(name)
        masks = sum(math.ceil(mask.numel() / 8) for mask in entry.masks.values())
        tensors = sum(4 * tensor.numel() for tensor in entry.tensors.values())
        assert (size.entries[name].masks, size.entries[name].tensors) == (masks, tensors)
        assert size.entries[name] == entry.size()
        head = 4 * (7 * 16 + 7)
        assert size.entries[name].head_float32 == head
    assert size.backbone == 4 * NUM_PARAMETERS and size.total == size.backbone + os.path.getsize(bank.path)
    assert size.separate == 2 * (size.backbone + head)
    assert size.saved == pytest.approx(1 - size.total / size.separate)


XLSR_300M = EncoderConfig(
    conv_layers=parse_conv_layers("[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2"),
    embed_dim=1024,
    layers=uniform_layers(24, 16, 64, 4096),
    extractor_mode="layer_norm",
    conv_bias=True,
    layer_norm_first=True,
)


def test_eleven_languages_over_xlsr_take_a_ninth_of_eleven_models() -> None:
    with torch.device("meta"):
        encoder = SpeechEncoder(XLSR_300M)
        num_parameters = sum(p.numel() for p in encoder.parameters())
        assert num_parameters == 315_438_720, "the released model's"
        modules = [f"w2v_model.encoder.layers.{i}.{fc}" for i in range(24) for fc in ("fc1", "fc2")]
        masks = {
            m: torch.ones_like(encoder.get_submodule(m.removeprefix("w2v_model.")).weight, dtype=torch.bool)
            for m in modules
        }
        entries = {}
        for i in range(11):
            num_symbols = 32 + round(i * 3.2)
            tensors = {
                "w2v_model.mask_emb": torch.empty(1024),
                "proj.weight": torch.empty(num_symbols, 1024),
                "proj.bias": torch.empty(num_symbols),
            }
            entries[f"l{i}"] = BankEntry(f"l{i}", masks, tensors)
    assert {len(e.tensors["proj.bias"]) for e in entries.values()} >= {32, 64}
    size = bank_size(num_parameters, {n: e.size() for n, e in entries.items()}, header=1_000_000)  # 80 kB in truth
    assert size.entries["l0"].masks == 24 * 2 * 1024 * 4096 // 8
    assert size.separate > 11 * 4 * num_parameters
    assert size.saved >= 0.885
