"""Latency tables: they give back what was measured, follow products, never reward growth, and refuse other encoders."""

from __future__ import annotations

import dataclasses
import json
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s3distill.encoder.config import ConvLayerConfig, EncoderConfig, LayerConfig
from s3distill.gates import UNITS, GateCounts, GateSet, LatencyTable, check_target, count_cost, minimum_counts, sparsity
from s3distill.gates.latency import Grid, parts

CONFIG = EncoderConfig(
    (ConvLayerConfig(6, 10, 5), ConvLayerConfig(8, 3, 2)),
    16,
    (LayerConfig(4, 4, 20), LayerConfig(4, 4, 20), LayerConfig(2, 8, 12, ffn=False)),
    pos_conv_kernel=4,
    pos_conv_groups=2,
)


def grid(rows: tuple[int, ...], columns: tuple[int, ...], unit_s: float = 1e-6) -> Grid:
    """A part whose time is 5 units + the product of its sizes, 0 at row 0."""
    return Grid(rows, columns, tuple(tuple(unit_s * (5 + r * c) * (r > 0) for c in columns) for r in rows))


def table(**changes: object) -> LatencyTable:
    grids = {
        "conv.0": grid((1,), (1, 3, 6)),
        "conv.1": grid((1, 3, 6), (1, 4, 8)),
        "projection": grid((1, 4, 8), (2, 8, 16)),
        "pos_conv": grid((2, 8, 16), (2, 8, 16)),
        "attention.4x4": grid((0, 1, 2, 4), (2, 8, 16)),
        "attention.2x8": grid((0, 1, 2), (2, 8, 16)),
        "ffn.20": grid((0, 5, 20), (2, 8, 16)),
        **changes,
    }
    return LatencyTable(CONFIG, grids, 0.002, 0.5, {"cpu": "a machine", "num_threads": 1})


def test_the_whole_encoder_takes_what_was_measured() -> None:
    assert float(table()(CONFIG, GateCounts.full(CONFIG))) == pytest.approx(0.002 / 0.5, rel=1e-12)
    assert float(sparsity(CONFIG, GateCounts.full(CONFIG), table())) == pytest.approx(0, abs=1e-12)


def test_a_grid_gives_back_its_own_entries() -> None:
    generator = torch.Generator().manual_seed(0)
    seconds = torch.rand(4, 3, generator=generator, dtype=torch.float64).cumsum(0).cumsum(1)
    own = Grid((1, 2, 7, 9), (3, 4, 10), tuple(map(tuple, seconds.tolist())))
    for (i, row), (j, column) in product(enumerate(own.rows), enumerate(own.columns)):
        at = own.at(torch.tensor([row], dtype=torch.float64), torch.tensor([column], dtype=torch.float64))
        assert float(at) == pytest.approx(float(seconds[i, j]), rel=1e-12)


@settings(deadline=None, max_examples=50)
@given(row=st.floats(1, 8), column=st.floats(2, 16))
def test_products_are_followed_between_the_entries(row: float, column: float) -> None:
    x, y = (torch.tensor([value], dtype=torch.float64) for value in (row, column))
    assert float(grid((1, 4, 8), (2, 8, 16)).at(x, y)) == pytest.approx(1e-6 * (5 + row * column), rel=1e-9)


def test_layers_of_one_shape_share_a_part_and_absent_ones_take_nothing() -> None:
    full = GateCounts.full(CONFIG)
    assert dict((name, rows) for name, rows, _ in parts(CONFIG, full))["attention.4x4"] == [4, 4]
    gone = dataclasses.replace(full, attention_layers=(0, 1, 1))
    own = table()
    saved = own.breakdown(full)["attention.4x4"] - own.breakdown(gone)["attention.4x4"]
    assert saved == pytest.approx(1e-6 * (5 + 4 * 16))
    assert sum(own.breakdown(gone).values()) < sum(own.breakdown(full).values())


def test_noise_never_makes_growth_look_cheap() -> None:
    """An entry that was disturbed into being faster than a smaller one counts as slow as that."""
    noisy = Grid((1, 2, 3), (1, 2), ((3.0, 4.0), (2.0, 6.0), (5.0, 5.5)))
    steps = torch.linspace(1, 3, 41, dtype=torch.float64)
    for column in (1.0, 1.5, 2.0):
        times = noisy.at(steps, torch.full_like(steps, column))
        assert (times.diff() >= 0).all() and times[0] >= 3


def test_gradient() -> None:
    full = GateCounts.full(CONFIG)
    sizes = [len(unit) for unit in full.as_dict().values()]
    # 0.7 of each size, off the entries of the grids, where the gradient jumps
    point = torch.tensor([float(c) * 0.7 for unit in full.as_dict().values() for c in unit], dtype=torch.float64)
    own = table()

    def cost(x: torch.Tensor) -> torch.Tensor:
        return sparsity(CONFIG, GateCounts(*(tuple(part.unbind()) for part in x.split(sizes))), own)  # type: ignore[return-value]

    assert torch.autograd.gradcheck(cost, point.requires_grad_())


def test_every_gate_that_saves_time_feels_it() -> None:
    gates = GateSet(CONFIG, UNITS, init_drop=0.5)
    count_cost(CONFIG, gates.expected_counts(), table()).backward()  # type: ignore[union-attr]
    for unit, layer, gate in gates.all_gates():
        assert gate.log_alpha.grad is not None and (gate.log_alpha.grad > 0).all(), (unit, layer)


def test_kept_counts_cost_what_the_cut_encoder_would() -> None:
    own, counts = table(), minimum_counts(CONFIG, UNITS)
    parts_s = own.breakdown(counts)
    # one channel in and out, one per group of two in the stream, no sub-layers
    assert parts_s["conv.1"] == pytest.approx(6e-6) and parts_s["pos_conv"] == pytest.approx(9e-6)
    assert parts_s["projection"] == pytest.approx(7e-6)
    assert parts_s["ffn.20"] == parts_s["attention.2x8"] == 0


def test_targets_by_latency() -> None:
    own = table()
    check_target(CONFIG, UNITS, 0.5, own)
    with pytest.raises(ValueError, match=r"a target sparsity of 0\.9 in latency cannot be reached by pruning head"):
        check_target(CONFIG, ["head"], 0.9, own)


def test_json_gives_the_same_table() -> None:
    again = LatencyTable.from_json(table().to_json())
    assert again == table() and again.to_json() == table().to_json()


def test_a_table_of_another_encoder_is_refused() -> None:
    other = dataclasses.replace(CONFIG, layers=CONFIG.layers[:2], pos_conv_kernel=6)
    with pytest.raises(
        ValueError, match=r"another shape than the student: `layers`, `pos_conv_kernel` differ \(width 16 and 3"
    ):
        table()(other, GateCounts.full(other))
    table().check_config(dataclasses.replace(CONFIG, group_norm_over_padding=True))  # no matter of shape


def test_what_is_no_table_is_refused() -> None:
    values = json.loads(table().to_json())
    for damaged in (
        "{oops",
        "[1]",
        "{}",
        json.dumps({**values, "format_version": 2}),
        json.dumps({**values, "config": 3}),
    ):
        with pytest.raises(ValueError, match=r"t\.json is no latency table that can be read \(.*write one with"):
            LatencyTable.from_json(damaged, "t.json")
    lacking = {**values, "grids": {k: v for k, v in values["grids"].items() if k != "ffn.20"}}
    with pytest.raises(ValueError, match=r"needs the parts \[.*'ffn.20'.*\], but has"):
        LatencyTable.from_json(json.dumps(lacking))
    with pytest.raises(ValueError, match="`whole_s` and `audio_s` of a latency table must be positive"):
        LatencyTable.from_json(json.dumps({**values, "whole_s": 0}))
    for rows, seconds, message in (
        ([2, 1], [[1], [1]], "`rows` of a latency grid must be one or more ascending sizes"),
        ([1, 2], [[1]], "a latency grid of 2 x 1 sizes needs as many times"),
        ([1, 2], [[1], [float("nan")]], "must be finite and at least 0; measure it again"),
    ):
        with pytest.raises(ValueError, match=message):
            Grid(tuple(rows), (1,), tuple(map(tuple, seconds)))
