"""A bank that a stranger wrote: whatever its header says, it is a bank or a `ValueError`, and nothing else happens."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from s3distill.cli.masks import describe, table
from s3distill.masks.bank import BankEntry, MaskBank
from s3distill.masks.bank_file import HEADER_KEY
from s3distill.masks.checksum import backbone_checksum, content_digest
from s3distill.masks.masked_model import MaskedModel
from tests.masks.banks import FFN, KINDS, NUM_PARAMETERS, make_backbone, make_entry

BACKBONE = make_backbone()
HUGE = 2**44
NUM_MUTATIONS = 2000


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank with nl, every kind of module masked, and fr. Read only."""
    path = tmp_path_factory.mktemp("bank") / "bank.safetensors"
    facts = {"labels": "ltr", "kind": "ctc", "date": "2026-01-01", "source": "run.pt", "blank_weight": 0.0}
    entries = [make_entry("nl", 1, modules=KINDS, blank_mode="add", **facts), make_entry("fr", 2, pattern="rows")]
    MaskBank.create(path, backbone_checksum(BACKBONE.encoder_state), NUM_PARAMETERS, entries)
    return path


Change = Callable[[dict[str, Any], dict[str, Tensor]], Any]


def rewrite(original: Path, path: Path, change: Change) -> Path:
    """Writes the bank anew with another header or other tensors, and with digests that are right for them."""
    with safetensors.safe_open(original, framework="pt") as handle:
        header = json.loads(handle.metadata()[HEADER_KEY])
        tensors = {key: handle.get_tensor(key).clone() for key in handle.keys()}  # noqa: SIM118  no mapping
    change(header, tensors)
    sign(header, tensors)
    safetensors.torch.save_file(tensors, path, {HEADER_KEY: json.dumps(header)})
    return path


def sign(header: Any, tensors: dict[str, Tensor]) -> None:
    """Digests as a stranger who knows the code would write them, wherever there is an entry to sign."""
    entries = header.get("entries") if isinstance(header, dict) else None
    for name, entry in entries.items() if isinstance(entries, dict) else ():
        if isinstance(entry, dict) and "digest" in entry:
            facts = {key: value for key, value in entry.items() if key != "digest"}
            own = {key: value for key, value in tensors.items() if key.startswith(f"{name}/")}
            entry["digest"] = content_digest(own, json.dumps(facts, sort_keys=True))


def use_everything(path: Path) -> list[str]:
    """What commands do with a bank; the names of its entries."""
    bank = MaskBank.open(path)
    list(bank.damaged_entries())
    table(describe(bank))
    model = MaskedModel.load(BACKBONE, bank)
    for name in bank.names:
        bank.entry(name)
        model.use(name)
    return list(bank.names)


def test_the_original_is_fine(original: Path, tmp_path: Path) -> None:
    assert use_everything(original) == ["nl", "fr"]
    assert use_everything(rewrite(original, tmp_path / "x", lambda header, tensors: None)) == ["nl", "fr"]


def info(**values: Any) -> Change:
    return lambda header, _: header["entries"]["nl"]["info"].update(values)


def entry(**values: Any) -> Change:
    return lambda header, _: header["entries"]["nl"].update(values)


def backbone(**values: Any) -> Change:
    return lambda header, _: header["backbone"].update(values)


def shape(*sizes: Any, axis: str = "full", num_bytes: int | None = None) -> Change:
    def change(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        header["entries"]["nl"]["masks"][FFN[0]] = [list(sizes), axis]
        if num_bytes is not None:
            tensors[f"nl/mask/{FFN[0]}"] = torch.zeros(num_bytes, dtype=torch.uint8)

    return change


def rename(name: str) -> Change:
    def change(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        header["entries"][name] = header["entries"].pop("nl")
        for key in [key for key in tensors if key.startswith("nl/")]:
            tensors[f"{name}/{key.removeprefix('nl/')}"] = tensors.pop(key)

    return change


def rename_module(module: str) -> Change:
    def change(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        header["entries"]["nl"]["masks"][module] = header["entries"]["nl"]["masks"].pop(FFN[0])
        tensors[f"nl/mask/{module}"] = tensors.pop(f"nl/mask/{FFN[0]}")

    return change


def tensor(name: str, value: Tensor) -> Change:
    return lambda _, tensors: tensors.update({f"nl/tensor/{name}": value})


def head_mask(*sizes: int) -> Change:
    def change(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        header["entries"]["nl"]["masks"]["proj"] = [list(sizes), "full"]
        tensors["nl/mask/proj"] = torch.zeros(-(-torch.Size(sizes).numel() // 8), dtype=torch.uint8)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, _: h.update(version=float("inf")), r"the version must be a number from 1 on, but is inf"),
        (lambda h, _: h.update(version=-3), "the version must be .* but is -3"),
        (lambda h, _: h.update(version=True), "the version must be .* but is True"),
        (backbone(num_parameters=float("inf")), r"`num_parameters` must be a count, 0 or more, but is inf"),
        (backbone(num_parameters=-1), "`num_parameters` must be a count, 0 or more, but is -1"),
        (backbone(num_parameters=True), "`num_parameters` must be a count, 0 or more, but is True"),
        (backbone(num_parameters=10**400), "`num_parameters` must be a count|OverflowError"),
        (
            backbone(num_parameters=300),
            rf"the mask of {FFN[0]} in 'nl' must not be larger than the backbone, which has 300",
        ),
        (backbone(checksum="ab"), "the backbone's checksum must be 64 hexadecimal digits, but is 'ab'"),
        (shape(float("inf"), 16), r"the shape of a mask must be 1 to 3 positive sizes, but is \[inf, 16\]"),
        (shape(-24, -16), r"positive sizes, but is \[-24, -16\]"),
        (shape(0, 16, num_bytes=0), r"positive sizes, but is \[0, 16\]"),
        (shape(*[1] * 70, num_bytes=1), "the shape of a mask must be 1 to 3 positive sizes"),
        (shape(24, axis="rows"), r"the shape of a mask must be 2 to 3 positive sizes, but is \[24\]"),
        (shape(8, HUGE, axis="rows", num_bytes=1), "must not be larger than the backbone"),
        (info(weights_dtype="load"), "`weights_dtype` must be one of float32, float16, bfloat16, but is 'load'"),
        (info(weights_dtype=5), "`weights_dtype` must be one of .* but is 5"),
        (info(pattern="diagonal"), "`pattern` must be one of unstructured, 2:4, rows, columns, but is 'diagonal'"),
        (info(kind=["ctc"]), r"`kind` must be one of ctc, classification, but is \['ctc'\]"),
        (info(density="half"), "`density` must be a kept fraction from 0 to 1, but is 'half'"),
        (info(density=1.5), "`density` must be a kept fraction from 0 to 1, but is 1.5"),
        (info(normalize="no"), "`normalize` must be true or false, but is 'no'"),
        (info(date=5), "`date` must be a text, but is 5"),
        (info(source=None), "`source` must be a text, but is None"),
        (info(labels=["ltr"]), "`labels` must be a text, or null"),
        (info(blank_weight="1"), "`blank_weight` must be a number, but is '1'"),
        (info(blank_weight=float("nan")), "`blank_weight` must be a number, but is nan"),
        (info(blank_mode=1), "`blank_mode` must be a text, but is 1"),
        (info(comment="\ud800"), "damaged header .UnicodeEncodeError"),
        (entry(info=[1, 2]), "`info` of an entry must hold values by their names"),
        (entry(info="ab"), "`info` of an entry must hold values by their names"),
        (entry(symbols="abcdefg"), "the symbols of an entry must be a list of texts, or null"),
        (entry(symbols=[1] * 7), "the symbols of an entry must be a list of texts, or null"),
        (entry(symbols=["a"]), "the head of 'nl' must have an output for each of its 1 symbols, but has 7"),
        (entry(tensors="ab"), "the trained tensors of an entry must be different names"),
        (
            lambda h, _: h["entries"]["nl"]["tensors"].append("proj.weight"),
            "the trained tensors of an entry must be different names",
        ),
        (rename("../../etc/x"), r"a name in a mask bank must begin with .* but is '\.\./\.\./etc/x'"),
        (rename("\x1b[2Jnl\n"), r"a name in a mask bank must begin with .* but is '\\x1b\[2Jnl\\n'"),
        (rename("a/mask/b"), "a name in a mask bank must begin with"),
        (rename(""), "a name in a mask bank must begin with"),
        (
            rename_module(FFN[0].removeprefix("w2v_model.")),
            r"must be of the encoder \(w2v_model\.\) or the head \(proj\)",
        ),
        (rename_module("w2v_model.\x1b[2J"), r"must be of the encoder .* but are also \['w2v_model\.\\x1b\[2J'\]"),
        (rename_module("w2v_model.x"), "does not fit the backbone: x.weight_v of shape"),
        (
            head_mask(5, 5),
            r"the mask of the head of 'nl' must have the shape of its weight, \(7, 16\), but has \(5, 5\)",
        ),
        (tensor("proj.weight", torch.zeros(3, 3)), "the head of 'nl' must have a weight"),
        (tensor("proj.weight", torch.zeros(7)), "the head of 'nl' must have a weight"),
        (tensor("proj.bias", torch.zeros(3)), r"but has the shapes \(7, 16\) and \(3,\)"),
        (tensor("w2v_model.mask_emb", torch.zeros(16, dtype=torch.int64)), "must be of a type of F16, .* is of I64"),
        (tensor("w2v_model.mask_emb", torch.zeros(17)), "does not fit the backbone: mask_emb of shape"),
    ],
)
def test_what_a_header_must_not_say(change: Change, message: str, original: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        use_everything(rewrite(original, tmp_path / "x", change))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"info": {"kind": "tts"}}, r"`kind` must be one of ctc, classification, but is 'tts' \(in 'nl'\)"),
        ({"info": {"density": 2}}, r"`density` must be a kept fraction from 0 to 1, but is 2 \(in 'nl'\)"),
        ({"tensors": {"proj.weight": torch.ones(7, 16)}}, r"must have a weight .* has the shapes \(7, 16\) and None"),
        ({"tensors": {"w2v_model.x": torch.ones(2, dtype=torch.int32)}}, "trained tensors must be floating point"),
    ],
)
def test_what_cannot_be_read_is_not_made(changes: dict[str, Any], message: str) -> None:
    values = {"masks": make_entry().masks, "symbols": None, **changes}
    with pytest.raises(ValueError, match=message):
        BankEntry("nl", **values)


@pytest.mark.parametrize("module", ["encoder.layers.0.fc1", "proj2", "w2v_model.", "w2v_model.é"])
def test_what_cannot_be_read_is_not_written(module: str, tmp_path: Path) -> None:
    one = BankEntry("nl", {module: torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"must be of the encoder \(w2v_model\.\) or the head \(proj\), but are also"):
        MaskBank.create(tmp_path / "bank", "ab" * 32, NUM_PARAMETERS, [one])
    with pytest.raises(ValueError, match="must not be larger than the backbone, which has 383 parameters"):
        MaskBank.create(tmp_path / "bank", "ab" * 32, 383, [make_entry()])
    assert not list(tmp_path.iterdir())


# --- mutations

HOSTILE = (
    *(None, True, False, 0, -1, 1, 7, HUGE, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *(
        "",
        "nl",
        "fr",
        "proj",
        "proj.weight",
        "w2v_model.x",
        "rows",
        "columns",
        "load",
        "é",
        "\x1b[2J",
        "\ud800",
        "../x",
        "a" * 999,
    ),
    *([], {}, [[]], [1], ["a"], [[24, 16], "rows"], [[HUGE, 1], "columns"], {"a": {}}, [None]),
)


def mutate(header: Any, rng: random.Random) -> None:
    """Replaces, removes, renames, doubles or adds something at a random place."""
    places = list(places_of(header))
    for _ in range(rng.choice((1, 1, 2, 3))):
        holder, key = rng.choice(places)
        if key not in (holder if isinstance(holder, dict) else range(len(holder))):
            continue
        value, way = copy.deepcopy(rng.choice(HOSTILE)), rng.randrange(5)
        if way == 0:
            del holder[key]
        elif way == 1 and isinstance(holder, dict):
            holder[str(value)] = holder.pop(key)
        elif way == 2 and isinstance(holder, list):
            holder.append(holder[key])
        else:
            holder[key] = value


def places_of(node: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    for key in keys:
        yield node, key
        yield from places_of(node[key])


def test_a_mutated_header_is_a_bank_or_a_value_error(original: Path, tmp_path: Path) -> None:
    """Half of the times a value of the header is another and the digests are right; half of the times its bytes are."""
    rng, path, results = random.Random(0), tmp_path / "mutated", Counter[str]()
    contents = original.read_bytes()
    (size,) = struct.unpack("<Q", contents[:8])
    outer, data = json.loads(contents[8 : 8 + size]), contents[8 + size :]
    inner, tensors = json.loads(outer["__metadata__"][HEADER_KEY]), safetensors.torch.load_file(original)
    for i in range(NUM_MUTATIONS):
        if i % 2:
            header = copy.deepcopy(inner)
            mutate(header, rng)
            sign(header, tensors)
            outer["__metadata__"][HEADER_KEY] = json.dumps(header)
            text = json.dumps(outer).encode()
        else:
            text = bytearray(contents[8 : 8 + size])
            for _ in range(rng.choice((1, 1, 2, 4))):
                text[rng.randrange(size)] = rng.choice((rng.randrange(256), *b'"09-}] e'))
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)
        try:
            use_everything(path)
            results["accepted"] += 1
        except ValueError as error:
            assert str(error).isprintable(), repr(str(error))
            results["refused"] += 1
    assert set(results) == {"accepted", "refused"} and min(results.values()) > 20, results
