"""`s3distill tune-lm`: the sweep finds weights that are known to be best, and the command writes and prints them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("flashlight.lib.text")
pytest.importorskip("kenlm")
pytest.importorskip("fairseq")
pytest.importorskip("matplotlib")

from s3distill.analysis.lm_weights import Trial, compute_log_probs, plot_trials, sweep
from s3distill.cli.main import main
from s3distill.data.manifest import read_manifest
from s3distill.decoding.lexicon_lm import LexiconLmSearch, LmOptions
from tests.decoding.test_lexicon_lm import BAR, BLANK, LEXICON, SYMBOLS, A, B, write_arpa
from tests.tasks.test_audio_ctc import SAMPLES, checkpoints, corpus  # noqa: F401  fixtures

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # hydra's, about fairseq's use of it


@pytest.fixture
def search(tmp_path: Path) -> LexiconLmSearch:
    (tmp_path / "lexicon.txt").write_text(LEXICON)
    model = write_arpa(tmp_path / "words.arpa", {"AB": -0.1, "BA": -2.0, "A": -2.0})
    return LexiconLmSearch(SYMBOLS, BLANK, LmOptions(tmp_path / "lexicon.txt", model, 1.0))


def frames(first: list[float], second: list[float]) -> torch.Tensor:
    """Three frames: A or B, A or B, then |; [A, B] probabilities of the first two."""
    probabilities = torch.full((3, len(SYMBOLS)), 1e-6)
    probabilities[0, [A, B]], probabilities[1, [A, B]] = torch.tensor(first), torch.tensor(second)
    probabilities[2, BAR] = 1.0
    return (probabilities / probabilities.sum(-1, keepdim=True)).log()


def test_the_sweep_finds_the_weight_that_is_best(search: LexiconLmSearch) -> None:
    """Said was AB, which the model hears as BA by a little, and BA, which it hears surely: only a medium weight gets both."""
    log_probs = [frames([0.3, 0.7], [0.7, 0.3]), frames([0.001, 0.999], [0.999, 0.001])]
    trials = sweep(log_probs, ["AB", "BA"], search, "".join, [0.0, 2.0, 20.0], [0.0, 0.5], progress=False)
    assert len(trials) == 6 and [t.wer for t in trials] == sorted(t.wer for t in trials)
    assert (trials[0].lm_weight, trials[0].word_score, trials[0].wer, trials[0].uer) == (2.0, 0.0, 0.0, 0.0)
    worse = {t.lm_weight: t.wer for t in trials if t.lm_weight != 2.0}
    assert worse == {0.0: 50.0, 20.0: 50.0}


def test_the_plot_frames_the_best() -> None:
    trials = [Trial(1.0, 0.0, 5.0, 2.0), Trial(2.0, 0.0, 9.25, 3.0), Trial(1.0, -1.0, 7.0, 2.0)]
    plot = plot_trials(trials)
    assert plot.startswith("<svg") and ">9.2<" in plot
    assert "Best: 5.00% at language model 1, word score 0; worst: 9.25%." in plot
    assert plot_trials(trials[:1]).count("<path") < plot.count("<path")


def test_log_probs_do_not_depend_on_the_batch(
    corpus: Path,  # noqa: F811
    checkpoints: dict[str, Path],  # noqa: F811
) -> None:
    import s3distill

    model, manifest = s3distill.load(checkpoints["wav2vec_ctc"]), read_manifest(corpus / "test.tsv")
    single, batched = (compute_log_probs(model, manifest, size, progress=False) for size in (1, 5))
    assert [len(x) for x in single] == [model.encoder.config.num_frames(n) for n in SAMPLES]
    for one, other in zip(single, batched, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.exp().sum(-1), torch.ones(len(one)))


def test_the_command(
    corpus: Path,  # noqa: F811
    checkpoints: dict[str, Path],  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "lexicon.txt").write_text(LEXICON)
    model = write_arpa(tmp_path / "words.arpa", {"AB": -0.3, "A": -0.9, "BA": -1.2})
    command = ["tune-lm", str(corpus / "test.tsv"), "--model", str(checkpoints["wav2vec_ctc"]), "--no-progress"]
    files = ["--lexicon", str(tmp_path / "lexicon.txt"), "--ngram-lm", str(model)]
    values = ["--lm-weights", "0.5,4", "--word-scores=-3,0"]
    assert main([*command, *files, *values, "--beam", "20", "-o", str(tmp_path)]) == 0
    trials = [Trial(**trial) for trial in json.loads((tmp_path / "tune-lm.json").read_text())]
    assert {(t.lm_weight, t.word_score) for t in trials} == {(0.5, -3.0), (0.5, 0.0), (4.0, -3.0), (4.0, 0.0)}
    printed, page = capsys.readouterr().out, (tmp_path / "tune-lm.html").read_text()
    best = trials[0]
    assert f"--ngram-lm {model} --lm-weight {best.lm_weight:g}" in printed and "--decoder lexicon --beam 20" in printed
    assert (f"--word-score={best.word_score:g}" in printed) == (best.word_score != 0)
    assert "<svg" in page and all(f"<td>{t.wer:.2f}</td>" in page for t in trials)

    for more, message in (
        ([*files, "-o", str(tmp_path / "none")], "the folder of the results must exist"),
        ([], "needs `lexicon`, `ngram_lm` or both, but has neither"),
        ([*files, "--lm-weights=-1,2"], "`lm_weight` must be a number of at least 0"),
        ([*files, "--labels", "phn"], "test.phn"),
    ):
        assert main([*command, *more]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, *files, "--lm-weights", "1,x"])
    assert "must be numbers with commas between them, such as 0.5,1,2, but is '1,x'" in capsys.readouterr().err
