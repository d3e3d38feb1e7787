"""The report on masks: one file that needs nothing from outside and holds every pair, CSV files, and the commands."""

import argparse
import csv
import html.parser
import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from s3distill.analysis.mask_report import EXPLANATION, compare_with_reference, rank_pairs, write_mask_report
from s3distill.analysis.mask_similarity import MaskComparison, compare_masks
from s3distill.cli import masks_similarity
from s3distill.data.similarity_csv import SimilarityMatrix, read_similarity, write_similarity
from s3distill.masks.bank import BankEntry, MaskBank

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

NAMES = ("en", "nl", "de", "es")
KINDS = ("self_attn.k_proj", "fc1")
MODULES = ("w2v_model.post_extract_proj", *(f"w2v_model.encoder.layers.{i}.{kind}" for i in range(3) for kind in KINDS))


class Page(html.parser.HTMLParser):
    """Collects tags, and checks that they nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def make_bank(path: Path, names: tuple[str, ...] = NAMES, constant: str = "") -> MaskBank:
    """Random masks, of which neighbours in ``names`` share some; one entry may keep everything."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.rand(len(names) + 1, 16, 8, generator=generator)
    entries = []
    for i, name in enumerate(names):
        scores = {m: shared[i] + shared[i + 1] + torch.rand(16, 8, generator=generator) for m in MODULES}
        entries.append(BankEntry(name, {m: s > (-1 if name == constant else 1) for m, s in scores.items()}))
    return MaskBank.create(path, "0" * 64, 1000, entries)


@pytest.fixture
def comparison(tmp_path: Path) -> MaskComparison:
    return compare_masks(make_bank(tmp_path / "bank.safetensors"))


@pytest.fixture
def reference() -> SimilarityMatrix:
    values = np.random.default_rng(0).random((6, 6))
    return SimilarityMatrix(("it", "es", "de", "nl", "en", "fr"), (values + values.T) / 2)


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_one_page_holds_every_pair_and_every_plot(
    tmp_path: Path, comparison: MaskComparison, reference: SimilarityMatrix
) -> None:
    tested = compare_with_reference(comparison, reference, "phonemes.csv")
    path = write_mask_report(tmp_path / "out" / "deep", comparison, "bank & co", tested)[0]
    text = path.read_text()
    page = Page(text)
    assert "What the masks say: bank &amp; co" in text and EXPLANATION in text
    assert page.found.count("svg") == 4 and page.found.count("table") == 2  # heat map, tree, layers, scatter
    for (a, b), overlap in comparison.pairs.items():
        row = re.search(rf"<tr><td>{a}\xa0-\xa0{b}</td>.*?</tr>", text)
        assert row and f"<td>{overlap.kappa:.4f}</td>" in row[0] and f"<td>{overlap.cosine:.4f}</td>" in row[0]
    for (measure, kind), test in tested.tests.items():
        assert f"<td>{measure}, {kind.capitalize()}</td><td>{test.correlation:.4f}</td>" in text
    assert "over all 24 orders of the names" in text and "Not in the bank: it, fr." in text
    assert "prefers-color-scheme: dark" in text and "currentColor" in text


def test_nothing_is_loaded_from_outside_and_ids_are_unique(
    tmp_path: Path, comparison: MaskComparison, reference: SimilarityMatrix
) -> None:
    tested = compare_with_reference(comparison, reference, "phonemes.csv")
    text = write_mask_report(tmp_path, comparison, "bank", tested)[0].read_text()
    assert not re.findall(r"https?://|//www\.|<script|<link|@import|<img|<image", text)
    references = re.findall(r'href="([^"]*)"', text) + re.findall(r"url\(([^)]*)\)", text)
    assert all(found.startswith("#") for found in references)
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids)) and {r.removeprefix("#") for r in references} <= set(ids)


def test_csv_files_say_what_was_measured(tmp_path: Path, comparison: MaskComparison) -> None:
    paths = write_mask_report(tmp_path / "out", comparison, "bank")
    assert [p.name for p in paths] == ["similarity.html", "pairs.csv", "layers.csv", "kappa.csv"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in paths)
    pairs = read_rows(paths[1])
    assert [(row["a"], row["b"]) for row in pairs] == list(itertools.combinations(NAMES, 2))
    layers = read_rows(paths[2])
    assert len(layers) == 6 * 4 and list(dict.fromkeys(row["layer"] for row in layers)) == [
        "post_extract_proj",
        "0",
        "1",
        "2",
    ]
    for row in pairs + layers:
        overlap = (comparison.groups[row["layer"]] if "layer" in row else comparison.pairs)[row["a"], row["b"]]
        for measure in ("kappa", "cosine", "chance_cosine", "jaccard", "density_a", "density_b"):
            assert float(row[measure]) == pytest.approx(getattr(overlap, measure), rel=1e-5)
        assert int(row["num_modules"]) == overlap.num_modules and int(row["num_connections"]) == overlap.num_connections
    again = read_similarity(paths[3])
    assert again.names == NAMES
    np.testing.assert_allclose(again.values, comparison.matrix("kappa").values, rtol=1e-5)


def test_by_module_there_is_a_plot_for_each_kind(tmp_path: Path) -> None:
    comparison = compare_masks(make_bank(tmp_path / "bank.safetensors"), "module")
    paths = write_mask_report(tmp_path / "out", comparison, "bank")
    assert paths[2].name == "modules.csv" and len(read_rows(paths[2])) == 6 * 7
    text = paths[0].read_text()
    for kind in (*KINDS, "other modules"):
        assert f'aria-label="kappa, {kind}. Mean of the pairs by' in text
    assert text.count("<svg") == 2 + 3


def test_many_entries_fit(tmp_path: Path) -> None:
    names = tuple(f"language-{i}" for i in range(16))
    comparison = compare_masks(make_bank(tmp_path / "bank.safetensors", names))
    text = write_mask_report(tmp_path, comparison, "bank")[0].read_text()
    Page(text)
    assert all(f"<td>{a}\xa0-\xa0{b}</td>" in text for a, b in itertools.combinations(names, 2))
    assert "Thin: one pair each." in text and "mean of all pairs" in text


def test_what_is_not_defined_is_shown_as_such(tmp_path: Path, reference: SimilarityMatrix) -> None:
    comparison = compare_masks(make_bank(tmp_path / "bank.safetensors", constant="nl"))
    assert math.isnan(comparison.pairs["en", "nl"].kappa)
    assert [math.isnan(o.kappa) for _, o in rank_pairs(comparison.pairs)] == [False] * 3 + [True] * 3
    paths = write_mask_report(
        tmp_path / "out", comparison, "bank", compare_with_reference(comparison, reference, "r.csv")
    )
    text = paths[0].read_text()
    assert "No tree: kappa is not defined for every pair" in text and text.count("<svg") == 3
    assert "<td>kappa, Pearson</td><td>not defined</td><td>not defined</td><td>not defined</td>" in text
    assert "over all 24 orders" in text and "<td>not defined</td>" in text and ">nan<" not in text
    assert next(row for row in read_rows(paths[1]) if row["b"] == "nl")["kappa"] == "nan"


def test_modules_that_some_entries_do_not_mask_are_named(tmp_path: Path) -> None:
    mask = torch.rand(8, 8) > 0.5
    entries = [BankEntry("en", dict.fromkeys(MODULES, mask)), BankEntry("nl", dict.fromkeys(MODULES[1:3], ~mask))]
    comparison = compare_masks(MaskBank.create(tmp_path / "bank.safetensors", "0" * 64, 1000, entries))
    text = write_mask_report(tmp_path, comparison, "bank")[0].read_text()
    assert "The entries do not mask the same modules" in text
    assert (
        "<li>en, 5 modules: post_extract_proj, layers.1.self_attn.k_proj, layers.1.fc1" in text and "<li>nl" not in text
    )


def run(command, *argv: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(list(map(str, argv))))


def test_command(tmp_path: Path, reference: SimilarityMatrix, capsys: pytest.CaptureFixture[str]) -> None:
    make_bank(tmp_path / "bank.safetensors")
    write_similarity(tmp_path / "phonemes.csv", reference)
    options = ["--reference", tmp_path / "phonemes.csv", "--permutations", 10, "--seed", 3, "-o", tmp_path / "out"]
    assert run(masks_similarity, tmp_path / "bank.safetensors", "--by", "module", *options) == 0
    printed = capsys.readouterr().out
    assert printed.count("kappa") == 6 + 2 and "kappa against phonemes.csv: Pearson r" in printed
    text = (tmp_path / "out" / "similarity.html").read_text()
    assert "over 10 random orders of the names" in text and str(tmp_path) not in text


def test_errors_write_nothing(tmp_path: Path, comparison: MaskComparison, reference: SimilarityMatrix) -> None:
    lacking = reference.select(["it", "es", "de"])
    with pytest.raises(
        ValueError, match=r"the reference r.csv must have a row for every entry, but en, nl is missing; it has it"
    ):
        compare_with_reference(comparison, lacking, "r.csv")
    make_bank(tmp_path / "two.safetensors", NAMES[:2])
    write_similarity(tmp_path / "r.csv", reference)
    with pytest.raises(
        ValueError, match="a comparison with a reference needs at least 3 entries, but there are en, nl"
    ):
        run(masks_similarity, tmp_path / "two.safetensors", "--reference", tmp_path / "r.csv", "-o", tmp_path / "out")
    make_bank(tmp_path / "one.safetensors", NAMES[:1])
    with pytest.raises(ValueError, match="needs at least two entries, but the bank has en"):
        run(masks_similarity, tmp_path / "one.safetensors", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be a square table .* but has columns none and rows none"),
        (",a,b\na,1,2\n", "but has columns a, b and rows a"),
        (",a,b\nb,1,2\na,2,1\n", "with the same names, each once, .* columns a, b and rows b, a"),
        (",a,a\na,1,2\na,2,1\n", "but has columns a, a and rows a, a"),
        (",a,b\na,1,x\nb,2,1\n", "must hold numbers, but row 'a' does not .*'x'"),
        (",a,b\na,1\nb,2,1\n", "must have 2 finite numbers in each row, but row 'a' has 1"),
        (",a,b\na,1,nan\nb,nan,1\n", "must have 2 finite numbers in each row, but row 'a' has 1, nan"),
        (",a,b\na,1,0.2\nb,0.3,1\n", "must be symmetric, but has 0.2 for a, b and 0.3 for b, a"),
    ],
)
def test_a_reference_must_be_a_square_symmetric_table(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_similarity(path)


def test_a_reference_round_trip_and_a_missing_one(tmp_path: Path) -> None:
    matrix = SimilarityMatrix(("zh-CN", 'a, "b"'), np.array([[1, 1 / 3], [1 / 3, 1]]))
    write_similarity(tmp_path / "r.csv", matrix)
    again = read_similarity(tmp_path / "r.csv")
    assert again.names == matrix.names
    np.testing.assert_allclose(again.values, matrix.values, rtol=1e-5)
    (tmp_path / "excel.csv").write_text("\ufeff;".rstrip(";") + ", a ,b\n\n a ,1,.5\nb,0.5,1\n,,\n", encoding="utf-8")
    assert read_similarity(tmp_path / "excel.csv").names == ("a", "b")
    with pytest.raises(FileNotFoundError, match=r"gone.csv does not exist; make one with `s3distill masks inventory"):
        read_similarity(tmp_path / "gone.csv")
