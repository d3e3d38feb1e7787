"""Points of runs, their table, plots and files, and the `report` command over them."""

from __future__ import annotations

import csv
import json
import os
import re
from pathlib import Path

import pytest
import torch

from s3distill import compat
from s3distill.analysis.comparison import Point, Run, collect, compact_checkpoint, find_runs
from s3distill.analysis.comparison_report import markdown_table, plot_points, table_rows, write_comparison
from s3distill.cli.main import main
from s3distill.encoder.checkpoint import parse_checkpoint
from s3distill.encoder.config import EncoderConfig, parse_conv_layers, uniform_layers
from s3distill.encoder.model import SpeechEncoder
from s3distill.encoder.speech_model import SpeechModel
from s3distill.gates import GateCounts, GateSet, count_parameters

CONFIG = EncoderConfig(
    parse_conv_layers("[(8, 10, 5), (8, 3, 2), (8, 2, 2)]"),
    16,
    uniform_layers(2, 4, 4, 32),
    pos_conv_kernel=4,
    pos_conv_groups=4,
)


def write_student(path: Path, closed: int = 0) -> Path:
    """A gated student with so many FFN dims of each layer closed; without gates for 0."""
    torch.manual_seed(1)
    encoder, gates = SpeechEncoder(CONFIG), GateSet(CONFIG, ["ffn"])
    for gate in gates.gates("ffn").values():
        gate.log_alpha.data.fill_(8.0)[:closed] = -8.0
    options = {"_name": "ssl_student", "encoder": CONFIG.to_json(), "prune_units": ["ffn"] if closed else []}
    state = dict(encoder.state_dict())
    if closed:
        state |= {f"gates.{name}": value for name, value in gates.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    compat.write_checkpoint(path, state, options, {"normalize": False})
    return path


def write_run(folder: Path, closed: int = 0, loss: float | None = None, seconds: float = 90.0) -> Path:
    """The folder of a training."""
    write_student(folder / "checkpoints" / "checkpoint_last.pt", closed)
    lines = [f"[t][fairseq_cli.train][INFO] - done training in {seconds} seconds"]
    if loss is not None:
        stats = {"valid_num_updates": "5", "valid_loss_distill": str(loss), "valid_loss": "99"}
        lines = [f"[t][valid][INFO] - {json.dumps(stats)}", *lines]
    (folder / "hydra_train.log").write_text("\n".join(lines) + "\n")
    return folder


def write_scores(folder: Path, wer: float, subset: str = "test") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"scores-{subset}.json").write_text(json.dumps({"wer": wer, "uer": wer / 3}))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    folder = tmp_path / "sweep"
    for sparsity, closed, loss in (("0.3", 8, 1.25), ("0.6", 24, 1.5)):
        write_run(folder / f"sparsity_{sparsity}", closed, loss)
    (folder / "multirun.yaml").write_text("{}\n")
    return folder


def test_the_jobs_of_a_sweep_are_runs_of_one_series(sweep: Path) -> None:
    runs = find_runs([sweep])
    assert [(run.name, run.series) for run in runs] == [("sparsity_0.3", "sweep"), ("sparsity_0.6", "sweep")]
    assert [run.name for run in find_runs([f"FFN={sweep}"])] == ["FFN sparsity_0.3", "FFN sparsity_0.6"]


def test_closed_gates_are_not_counted(sweep: Path) -> None:
    points = collect(find_runs([sweep]), time_models=False)
    whole = count_parameters(CONFIG, GateCounts.full(CONFIG))
    per_dim = 2 * CONFIG.embed_dim + 1  # of fc1, its bias and fc2, in each of the two layers
    assert [point.params for point in points] == [whole - 2 * 8 * per_dim, whole - 2 * 24 * per_dim]
    assert points[0].macs_per_second > points[1].macs_per_second
    assert [point.loss for point in points] == [1.25, 1.5], "without the penalty"
    assert points[0].minutes == 1.5 and points[0].wer is None and points[0].rtf is None


def test_a_cut_in_memory_computes_what_the_gates_do(sweep: Path) -> None:
    path = str(sweep / "sparsity_0.6/checkpoints/checkpoint_last.pt")
    parsed = parse_checkpoint(compat.load_checkpoint(path), path)
    wave = torch.randn(1, 4000)
    with torch.no_grad():
        gated, cut = SpeechModel(parsed)(wave).x, SpeechModel(compact_checkpoint(parsed, path))(wave).x
    assert torch.allclose(gated, cut, atol=1e-5)


def test_the_last_training_of_a_chain_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    chain = tmp_path / "chain"
    for name, closed, loss, age in (("stage1", 8, 2.0, 200), ("stage2", 0, 1.0, 100), ("finetune", 0, None, 0)):
        path = write_run(chain / name, closed, loss) / "checkpoints/checkpoint_last.pt"
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    write_scores(chain / "decode", 12.5)
    write_scores(chain / "decode", 50.0, "valid")
    (run,) = find_runs([chain])
    assert run.checkpoint.parts[-3] == "finetune"
    (point,) = collect([run], time_models=True, seconds=1.0, num_threads=1)
    assert (point.wer, point.loss, point.minutes) == (12.5, 1.0, 4.5) and point.uer == pytest.approx(12.5 / 3)
    assert "finetune/hydra_train.log has no JSON progress line" in caplog.text
    assert point.rtf is not None and 0 < point.rtf < 1
    (other,) = collect(find_runs([chain], "valid"), time_models=False)
    assert other.wer == 50.0


def test_a_folder_of_hugging_face_is_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "hubert").mkdir()
    (tmp_path / "hubert/config.json").write_text("{}")
    (run,) = find_runs([tmp_path / "hubert"])
    assert (run.name, run.checkpoint, run.logs) == ("hubert", tmp_path / "hubert", ())


def test_losses_of_different_students_are_not_drawn_on_one_axis(tmp_path: Path) -> None:
    with_loss = [Point("a", 1, 1.0, wer=1.0, loss=5.0), Point("b", 2, 2.0, wer=2.0, loss=900.0)]
    assert "distillation loss" not in write_comparison(tmp_path / "r.html", with_loss)[0].read_text()
    sweep = [Point(p.name, p.params, p.macs_per_second, "sweep", wer=p.wer, loss=p.loss) for p in with_loss]
    assert "Distillation loss" in write_comparison(tmp_path / "s.html", sweep)[0].read_text()


def test_names(tmp_path: Path) -> None:
    checkpoint = write_student(tmp_path / "a=b.pt")
    assert [run.name for run in find_runs([checkpoint, f"other={checkpoint}"])] == ["a=b", "other"]
    with pytest.raises(ValueError, match=r"different names, but a=b came twice; name them: NAME=PATH"):
        find_runs([checkpoint, checkpoint])


def test_what_is_no_run_is_refused(tmp_path: Path, sweep: Path) -> None:
    with pytest.raises(ValueError, match=r"a run must be a checkpoint, or a folder with .* but .*nothing is none"):
        find_runs([tmp_path / "nothing"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/multirun.yaml").touch()
    with pytest.raises(ValueError, match=r"no job of the sweep .*empty has written"):
        find_runs([tmp_path / "empty"])
    for name in ("one", "two"):
        write_scores(sweep / "sparsity_0.3" / name, 1.0)
    with pytest.raises(ValueError, match="has several scores of test"):
        find_runs([sweep / "sparsity_0.3"])
    broken = tmp_path / "scores-test.json"
    broken.write_text("{}")
    with pytest.raises(ValueError, match=r"must hold the scores that s3_wer writes .* KeyError: 'wer'; decode again"):
        collect([Run("x", write_student(tmp_path / "x.pt"), scores=broken)], time_models=False)


POINTS = [
    Point("small", 1_000_000, 5e7, "sweep", 0.01, 20.0, 7.0, None, 3.0),
    Point("large", 2_000_000, 9e7, "sweep", 0.02, 15.0, 6.0, None, 4.0),
    Point("<other>", 1_500_000, 7e7, None, 0.015, None, None, None, None),
]
TEACHER = Point("teacher", 9_000_000, 9e8, None, 0.1, 10.0, 3.0)


def test_the_table_has_the_columns_that_are_known() -> None:
    rows = table_rows(POINTS)
    assert rows[0] == ["model", "params (M)", "MACs/s (M)", "RTF", "WER %", "UER %", "training min"], "no loss"
    assert rows[1] == ["small", "1.000", "50.0", "0.0100", "20.00", "7.00", "3.00"]
    assert rows[3][4:] == ["-", "-", "-"]
    lines = markdown_table(POINTS)
    assert lines[1] == "|---|---|---|---|---|---|---|" and all(line.count("|") == 8 for line in lines)


def test_the_plot_joins_a_sweep_and_dashes_the_teacher() -> None:
    svg = plot_points(POINTS, "wer", TEACHER)
    assert "small 20, large 15" in svg and "&lt;other&gt;" not in svg, "a run without figures is not drawn"
    assert svg.count("stroke-dasharray") == plot_points(POINTS, "wer").count("stroke-dasharray") + 6, "two per panel"
    assert all(label in svg for label in ("parameters (millions)", "MACs per second", "real-time factor"))
    without = plot_points([Point("a", 1, 1.0, wer=1.0), Point("b", 2, 2.0, wer=2.0)], "wer")
    assert "real-time factor" not in without, "what was not measured has no panel"


def test_the_files_hold_all_figures(tmp_path: Path) -> None:
    written = write_comparison(tmp_path / "r.html", POINTS, TEACHER, title="A & B")
    page = written[0].read_text()
    assert "<h1>A &amp; B</h1>" in page and "<td>&lt;other&gt;</td>" in page and "Dashed: the teacher, teacher." in page
    assert not re.search(r"(src|href)=\"http", page), "opens offline"
    with written[1].open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["name"] for row in rows] == ["teacher", "small", "large", "<other>"]
    assert float(rows[1]["wer"]) == 20.0 and rows[3]["wer"] == "" and int(rows[2]["params"]) == 2_000_000
    with pytest.raises(ValueError, match="there is nothing to draw"):
        write_comparison(tmp_path / "none.html", [POINTS[2]], TEACHER)
    assert not (tmp_path / "none.html").exists()


def test_the_command(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = write_student(tmp_path / "teacher.pt")
    out = tmp_path / "r.html"
    assert main(["report", str(sweep), "--teacher", str(teacher), "-o", str(out), "--seconds", "1"]) == 0
    printed = capsys.readouterr().out
    assert "| sparsity_0.3 |" in printed and "| teacher |" in printed and "r.csv" in printed
    assert "distillation loss per frame" in out.read_text()
    jobs = [str(sweep / "sparsity_0.3"), str(sweep / "sparsity_0.6")]
    assert main(["report", *jobs, "--join", "--no-rtf", "-o", str(out)]) == 0
    assert "s3distill: runs compared" in out.with_suffix(".csv").read_text(), "joined as one series"
    for arguments, message in (
        ([str(sweep), "--teacher", str(sweep)], "`--teacher` must be one run, but"),
        ([str(sweep), "-o", "r.pdf"], "`--output` must end in .html, but is r.pdf"),
    ):
        assert main(["report", *arguments]) == 2
        assert message in capsys.readouterr().err
