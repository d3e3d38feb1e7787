"""Closed rows and columns that are left out: same function, fewer multiplications, and what `inspect` says of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from s3distill.analysis import measure
from s3distill.cli.main import main
from s3distill.encoder.config import EncoderConfig, parse_conv_layers, uniform_layers
from s3distill.masks.compact import CompactLinear, bake_compact
from s3distill.masks.network import MaskedNetwork
from s3distill.masks.options import MaskOptions

CONFIG = EncoderConfig(
    conv_layers=parse_conv_layers("[(16, 10, 5)] + [(16, 3, 2)] * 4 + [(16, 2, 2)] * 2"),
    embed_dim=32,
    layers=uniform_layers(2, 4, 8, 48),
    pos_conv_kernel=16,
    pos_conv_groups=4,
)


def network(pattern: str, density: float = 0.5) -> MaskedNetwork:
    torch.manual_seed(0)
    made = MaskedNetwork(CONFIG, 7)
    made.add_masks(MaskOptions(prune_rate=density, mask_pattern=pattern))
    for module in made.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias)  # a closed row leaves its bias
    return made.eval()


@pytest.mark.parametrize(("closed_rows", "closed_columns"), [([0, 3], []), ([], [1, 2]), ([4], [0]), ([], [])])
def test_a_compact_linear_computes_what_the_masked_weight_does(
    closed_rows: list[int], closed_columns: list[int]
) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(5, 4), torch.randn(5), torch.randn(2, 3, 4)
    weight[closed_rows] = 0
    weight[:, closed_columns] = 0
    for b in (bias, None):
        compact = CompactLinear(weight, b)
        torch.testing.assert_close(compact(x), nn.functional.linear(x, weight, b))
        assert compact.weight.shape == (5 - len(closed_rows), 4 - len(closed_columns))


def test_a_matrix_without_any_connection_is_its_bias() -> None:
    compact = CompactLinear(torch.zeros(3, 4), torch.arange(3.0))
    assert compact(torch.randn(2, 4)).tolist() == [[0.0, 1.0, 2.0]] * 2


@pytest.mark.parametrize("pattern", ["rows", "columns"])
def test_whole_rows_or_columns_are_left_out(pattern: str) -> None:
    masked = network(pattern)
    compact = copy.deepcopy(masked)
    x = torch.randn(2, 8000)
    assert bake_compact(compact) == 13  # 6 Linears in each of 2 layers, and the features' projection
    torch.testing.assert_close(compact(x)[0], masked(x)[0], atol=1e-5, rtol=1e-5)
    sizes = [sum(p.numel() for n, p in m.named_parameters() if n.endswith(".weight")) for m in (compact, masked)]
    assert sizes[0] < 0.8 * sizes[1]


def test_scattered_zeros_leave_nothing_out() -> None:
    masked = network("unstructured", 0.9)
    compact = copy.deepcopy(masked)
    assert bake_compact(compact) == 0
    x = torch.randn(1, 8000)
    torch.testing.assert_close(compact(x)[0], masked(x)[0])


def write_run(path: Path, pattern: str) -> Path:
    """What a training with masks leaves behind."""
    options = {"_name": "wav2vec_ctc_st", "prune_rate": 0.5, "mask_pattern": pattern}
    options["w2v_args"] = {"model": {"_name": "ssl_student", "encoder": CONFIG.to_json()}, "task": {"normalize": False}}
    state = {f"w2v_encoder.{name}": value for name, value in network(pattern).state_dict().items()}
    torch.save({"model": state, "cfg": {"model": options, "task": {"normalize": False}}}, path)
    return path


@pytest.mark.parametrize(
    ("pattern", "says", "saved"),
    [
        ("rows", "real on any machine: closed rows are left out", 0.5),
        ("columns", "real on any machine: closed columns are left out", 0.5),
        ("unstructured", "storage only: zeros at any place are multiplied like other weights", 0.0),
        ("2:4", "storage here; real on GPUs with sparse tensor cores, in half precision or int8", 0.0),
    ],
)
def test_inspect_says_what_is_real(
    pattern: str,
    says: str,
    saved: float,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measure, "MIN_TIMING_S", 0.0)
    run = write_run(tmp_path / "run.pt", pattern)
    assert main(["inspect", str(run), "--seconds", "0.2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"masks: 13 ({pattern}) keep 50.00% of 14.85 k connections" in lines
    assert f"  speed:   {says}" in lines
    assert any("of the masked Linears' MACs; the encoder runs" in line for line in lines) == (saved > 0)
    assert main(["inspect", str(run), "--seconds", "0.2", "--json"]) == 0
    masks = json.loads(capsys.readouterr().out)["masks"]
    assert masks["macs_saved"] == pytest.approx(saved) and masks["weight_bytes"] == 4 * masks["connections"]
    per_connection = {"rows": 64, "columns": 64}.get(pattern, 1)  # rows and columns share a bit
    assert masks["mask_bytes"] * 8 * per_connection >= masks["connections"] > masks["mask_bytes"]


def test_a_dense_checkpoint_has_no_masks(tmp_path: Path) -> None:
    state = {f"w2v_encoder.{n}": v for n, v in MaskedNetwork(CONFIG, 7).state_dict().items()}
    options = {"_name": "wav2vec_ctc", "w2v_args": {"model": {"_name": "ssl_student", "encoder": CONFIG.to_json()}}}
    torch.save({"model": state, "cfg": {"model": options, "task": {}}}, tmp_path / "dense.pt")
    assert measure.describe(tmp_path / "dense.pt")["masks"] is None
