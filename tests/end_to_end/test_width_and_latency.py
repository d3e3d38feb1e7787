"""Width, positional convolution and latency through the real commands, and size targets through fairseq's trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import s3distill
from s3distill import compat
from s3distill.gates import LatencyTable

ALL_UNITS = "model.prune_units=[conv,head,ffn,width,pos_conv]"


@pytest.fixture(scope="module")
def table(kit: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("latency") / "table.json"
    command = ["s3distill", "latency-table", kit.teacher, "-o", path]
    done = kit.commands.run(*command, "--seconds", "0.5", "--threads", "1", "--repeats", "1").succeeded()
    assert "real-time factor" in done.output and f"wrote {path}" in done.output
    return path


def test_stage1_with_width_then_prune_then_stage2(kit: Any, tmp_path: Path) -> None:
    options = (ALL_UNITS, "model.gate_init_drop=0.5", "model.head_mode=predlayer", "model.head_init=default")
    kit.stage1(tmp_path / "stage1", *options, max_update=2).succeeded()
    gated, compact = kit.last_checkpoint(tmp_path / "stage1"), tmp_path / "compact.pt"
    pruned = kit.commands.run("s3distill", "prune", gated, compact).succeeded()
    assert "width " in pruned.output and "pos_conv " in pruned.output and "RTF" not in pruned.output

    before, after = s3distill.load(gated), s3distill.load(compact)
    stays = before.gates.deterministic().width > 0
    assert 8 <= int(stays.sum()) == after.encoder.config.embed_dim < 32
    waveforms, lengths = torch.randn(2, 8000, generator=torch.Generator().manual_seed(0)), torch.tensor([8000, 5000])
    with torch.no_grad():
        expected, got = before(waveforms, lengths), after(waveforms, lengths)
    valid = ~expected.padding_mask
    for x, y in zip([*expected.hidden_states, expected.x], [*got.hidden_states, got.x], strict=True):
        x = x[..., stays]
        assert (y[valid] - x[valid]).abs().max() <= 1e-5 * x[valid].abs().max()

    second = kit.stage1(
        tmp_path / "stage2",
        *(f"model.student_path={compact}", "model.prune_units=[]", "criterion.target_sparsity=0", *options[2:]),
        max_update=1,
    ).succeeded()
    assert "its heads come along" in second.output
    shown = kit.commands.run("s3distill", "inspect", compact, "--no-rtf").succeeded().output
    assert f"outputs into {int(stays.sum())} channels" in shown


def test_stage1_to_a_real_time_factor(kit: Any, table: Path, tmp_path: Path) -> None:
    whole = LatencyTable.from_json(table.read_text())
    target = 0.8 * whole.whole_s / whole.audio_s
    options = (ALL_UNITS, "model.prune_measure=latency", f"model.latency_table={table}", "model.gate_init_drop=0.3")
    run = kit.stage1(
        tmp_path / "run", *options, "criterion.target_sparsity=0", f"criterion.target_rtf={target:.6f}", max_update=2
    ).succeeded()
    logged = [json.loads(line[line.index("{") :]) for line in run.output.splitlines() if '"train_expected_rtf"' in line]
    assert logged and 0 < float(logged[-1]["train_expected_rtf"]) < whole.whole_s / whole.audio_s
    state = compat.load_checkpoint(kit.last_checkpoint(tmp_path / "run"))
    assert LatencyTable.from_json(state["cfg"]["model"]["latency"]).to_json() == whole.to_json(), "it rebuilds alone"

    pruned = kit.commands.run("s3distill", "prune", kit.last_checkpoint(tmp_path / "run"), tmp_path / "c.pt")
    assert "RTF predicted" in pruned.succeeded().output and "RTF measured" in pruned.output
    assert compat.load_checkpoint(tmp_path / "c.pt")["cfg"]["model"]["prune_measure"] == "params"


LATENCY = "model.prune_measure=latency"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((LATENCY,), "model.prune_measure=latency needs a table of this machine"),
        (("model.latency_table=TABLE",), "`model.latency_table` acts with model.prune_measure=latency only"),
        ((LATENCY, "model.latency_table=nowhere.json"), "model.latency_table cannot be read"),
        ((LATENCY, "model.latency_table=README.md"), "README.md is no latency table that can be read"),
        ((LATENCY, "model.latency_table=TABLE", "model.prune_units=[]"), "model.prune_measure=latency needs gates"),
        ((LATENCY, "model.latency_table=TABLE", "model.student_path=OTHER"), "`layers` differ"),
        (("criterion.target_rtf=0.1",), "`criterion.target_sparsity` and `criterion.target_rtf` both say"),
        (
            ("criterion.target_rtf=0.1", "criterion.target_sparsity=0"),
            "`criterion.target_rtf` needs gates and a latency",
        ),
        (
            (LATENCY, "model.latency_table=TABLE", "criterion.target_rtf=9", "criterion.target_sparsity=0"),
            "`criterion.target_rtf` must be above 0 and at most that of the whole encoder",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    kit: Any, table: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    other = kit.write_teacher(tmp_path / "other.pt", encoder_ffn_embed_dim=48)
    given = [option.replace("TABLE", str(table)).replace("OTHER", str(other)) for option in options]
    run = kit.stage1(tmp_path / "run", *given, max_update=1)
    assert run.status != 0 and message in run.output
