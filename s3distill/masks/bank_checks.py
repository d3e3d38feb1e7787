"""What may stand in a mask bank: names, the values of `BankEntry.info`, heads. Checked when an entry is made and when it is read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from s3distill.masks.options import ENCODER, HEAD
from s3distill.masks.selection import PATTERNS

WEIGHTS_DTYPES = ("float32", "float16", "bfloat16")
KINDS = ("ctc", "classification")
MODULE_NAME = re.compile(rf"{HEAD}|{ENCODER}(\.\w+)+", re.ASCII)
TENSOR_NAME = re.compile(rf"{HEAD}\.(weight|bias)|{ENCODER}(\.\w+)+", re.ASCII)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # also a file's name, a word of a shell and a part of a tensor's name
_SHA256 = re.compile(r"[0-9a-f]{64}")

# what is read of `BankEntry.info`; more may stand in it
_CHOICES = {"pattern": PATTERNS, "weights_dtype": WEIGHTS_DTYPES, "kind": KINDS}
_TEXTS = ("date", "source", "blank_mode")


def check_info(info: Any) -> None:
    """Refuses an `info` in which what is read of it has another type, or is no choice that there is (`ValueError`)."""
    if not isinstance(info, dict) or not all(isinstance(key, str) for key in info):
        raise ValueError("`info` of an entry must hold values by their names")
    rules = {
        "density": (_is_fraction, "a kept fraction from 0 to 1"),
        "normalize": (lambda value: isinstance(value, bool), "true or false"),
        "blank_weight": (_is_number, "a number"),
        "labels": (lambda value: value is None or isinstance(value, str), "a text, or null"),
        **dict.fromkeys(_TEXTS, (lambda value: isinstance(value, str), "a text")),
    }
    for key, value in info.items():
        if key in _CHOICES and value not in _CHOICES[key]:
            raise ValueError(f"`{key}` must be one of {', '.join(_CHOICES[key])}, but is {value!r}")
        if key in rules and not rules[key][0](value):
            raise ValueError(f"`{key}` must be {rules[key][1]}, but is {value!r}")


def check_head(name: str, symbols: list[str] | None, masks: Mapping[str, Any], shapes: Mapping[str, Any]) -> None:
    """Refuses a head that does not fit its dictionary or its mask, and half a head (`ValueError`).

    Args:
        masks: module -> what has the mask's ``shape``.
        shapes: shape of every trained tensor by full name.
    """
    weight, bias = (shapes.get(f"{HEAD}.{key}") for key in ("weight", "bias"))
    if weight is None and bias is None:
        return
    if weight is None or bias is None or len(weight) != 2 or tuple(bias) != (weight[0],):
        found = [None if shape is None else tuple(shape) for shape in (weight, bias)]
        raise ValueError(
            f"the head of {name!r} must have a weight [outputs, width] and a bias [outputs], but has the shapes {found[0]} and {found[1]}"
        )
    if symbols is not None and weight[0] != len(symbols):
        raise ValueError(
            f"the head of {name!r} must have an output for each of its {len(symbols)} symbols, but has {weight[0]}"
        )
    if HEAD in masks and tuple(masks[HEAD].shape) != tuple(weight):
        raise ValueError(
            f"the mask of the head of {name!r} must have the shape of its weight, {tuple(weight)}, but has {tuple(masks[HEAD].shape)}"
        )


def check_name(name: str) -> None:
    """Refuses what cannot be an entry's name (`ValueError`)."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"a name in a mask bank must begin with a letter or digit and hold only letters, digits, '.', '_' and '-', but is {name!r}; "
            "pass e.g. --name nl or --name zh-CN"
        )


def check_digest(what: str, digest: Any) -> None:
    """Refuses what is no SHA-256 (`ValueError`)."""
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise ValueError(f"{what} must be 64 hexadecimal digits, but is {digest!r}")


def check_names(what: str, names: Any, rule: re.Pattern[str]) -> None:
    """Refuses names that come twice or are neither of the encoder nor of the head (`ValueError`)."""
    if not is_texts(names) or len(set(names)) < len(names):
        raise ValueError(f"the {what} of an entry must be different names")
    wrong = [name for name in names if not rule.fullmatch(name)]
    if wrong:
        raise ValueError(
            f"the {what} of an entry must be of the encoder ({ENCODER}.) or the head ({HEAD}), but are also {wrong[:3]!r}"
        )


def is_texts(values: Any) -> bool:
    """A list of strings."""
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def is_count(value: Any) -> bool:
    """A whole number from 0 on that a float holds exactly, so that sums and shares of it are numbers too."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_fraction(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1
