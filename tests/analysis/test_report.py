"""The report: one file that holds everything, and needs nothing from outside."""

import html.parser
import json
import re
from pathlib import Path

import pytest

from s3distill.analysis.curves import Curve
from s3distill.analysis.plots import plot_curves, plot_kept_units
from s3distill.analysis.report import write_report

pytest.importorskip("matplotlib")

TEACHER = {"params": 2_000_000, "macs_per_second": 1.5e8, "rtf": 0.02, "wer": 5.5, "checkpoint_bytes": 8_000_000}
STUDENT = {"params": 500_000, "macs_per_second": 5e7, "rtf": 0.008, "wer": 7.25, "checkpoint_bytes": 2_000_000}
RESULTS = {"teacher": TEACHER, "student": STUDENT, "speedup": 2.5}
KEPT = {"conv": [(20, 48), (31, 48)], "head": [(1, 4), (4, 4)], "ffn": [(100, 512), (0, 512)]}


class Page(html.parser.HTMLParser):
    """Collects elements, and checks that they nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def log(tmp_path: Path) -> Path:
    lines = []
    for i in range(5):
        stats = {"loss": str(3 - i / 2), "expected_sparsity": str(i / 10), "target_sparsity": str(i / 8)}
        stats |= {"lambda1": str(i), "lambda2": str(2 * i), "num_updates": str(100 * (i + 1))}
        lines.append(f"[2026-01-31 12:00:00,000][train_inner][INFO] - {json.dumps(stats)}")
    lines.append(
        '[2026-01-31 12:00:00,000][valid][INFO] - {"valid_loss": "1.5", "valid_wer": "12", "valid_num_updates": "500"}'
    )
    path = tmp_path / "hydra_train.log"
    path.write_text("\n".join(lines))
    return path


def test_one_file_holds_table_plots_and_commands(tmp_path: Path, log: Path) -> None:
    path = tmp_path / "report.html"
    commands = ["fairseq-hydra-train common.user_dir=s3distill", "s3distill prune a.pt -o 'b & c.pt'"]
    write_report(path, RESULTS, {"stage 1": log, "fine-tuning": log}, KEPT, commands)
    text = path.read_text()
    page = Page(text)
    tags = [tag for tag, _ in page.found]
    svgs = [attributes for tag, attributes in page.found if tag == "svg"]
    assert len(svgs) == 1 + 2 * 3  # kept units; per run sparsity, loss and WER
    assert all(svg["role"] == "img" and len(svg["aria-label"] or "") > 20 for svg in svgs)
    assert tags.count("table") == 1 and tags.count("h1") == 1
    for figure in ("2.000", "0.500", "-75.0%", "150.0", "5.50", "7.25", "+1.75 points", "2.50x", "8.00"):
        assert f">{figure}<" in text, figure
    assert "is synthetic" in text and "b &amp; c.pt" in text
    assert "prefers-color-scheme: dark" in text and "currentColor" in text
    texts = re.findall(r"<text [^>]*style=\"([^\"]*)\"", text)
    assert texts and all("fill: currentColor" in style for style in texts), "black text does not show on a dark page"
    assert [p.name for p in tmp_path.iterdir() if "report" in p.name] == ["report.html"]


def test_nothing_is_loaded_from_outside_and_ids_are_unique(tmp_path: Path, log: Path) -> None:
    write_report(tmp_path / "report.html", RESULTS, {"a": log, "b": log}, KEPT)
    text = (tmp_path / "report.html").read_text()
    assert not re.findall(r"https?://|//www\.|<script|<link|@import|<img", text)
    references = re.findall(r'href="([^"]*)"', text) + re.findall(r"url\(([^)]*)\)", text)
    assert all(reference.startswith("#") for reference in references)
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    assert {r.removeprefix("#") for r in references} <= set(ids)


def test_kept_units_are_told_in_words_and_a_missing_figure_is_a_dash(tmp_path: Path) -> None:
    assert "attention heads: layer 0 1 of 4, layer 1 4 of 4" in plot_kept_units(KEPT)
    student = {k: v for k, v in STUDENT.items() if k != "rtf"}
    write_report(tmp_path / "r.html", {"teacher": TEACHER, "student": student}, {}, {})
    text = (tmp_path / "r.html").read_text()
    assert "<td>0.0200</td><td>-</td><td></td>" in text and "<svg" not in text and "speed-up" not in text


def test_curves_skip_what_is_not_finite() -> None:
    svg = plot_curves("loss", {"training": Curve([1, 2, 3], [3.0, float("nan"), 1.0])})
    assert 'aria-label="loss. training: 3 at update 1, 1 at update 3."' in svg


def test_errors_leave_an_old_report_untouched(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(
        ValueError, match=r"`results` must hold the figures of 'teacher' and 'student', but has \['student'\]"
    ):
        write_report(path, {"student": STUDENT}, {}, {})
    with pytest.raises(FileNotFoundError, match=r"gone\.log does not exist"):
        write_report(path, RESULTS, {"stage 1": tmp_path / "gone.log"}, {})
    assert path.read_text() == "old"
