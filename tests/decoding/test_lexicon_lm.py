"""Lexicon and n-gram decoding against all paths of small cases, and what is refused."""

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from s3distill.decoding.lexicon import read_lexicon
from s3distill.decoding.lexicon_lm import LexiconLmSearch, LmOptions

SYMBOLS = ["<s>", "<pad>", "</s>", "<unk>", "|", "A", "B"]
BLANK, BAR, A, B = 0, 4, 5, 6
UNIGRAMS = {"AB": -0.3, "A": -0.9, "BA": -1.2}  # log10
LEXICON = "AB\tA B |\nA\tA |\nBA\tB A |\n"


def write_arpa(path: Path, unigrams: dict[str, float], end: float = -1.0) -> Path:
    lines = [f"{score}\t{word}\t0" for word, score in {"<unk>": -5.0, "<s>": -99.0, **unigrams}.items()]
    lines.append(f"{end}\t</s>")
    head = f"\\data\\\nngram 1={len(lines)}\nngram 2=1\n\n\\1-grams:\n"
    path.write_text(head + "\n".join(lines) + f"\n\n\\2-grams:\n-0.1\t<s> {next(iter(unigrams))}\n\n\\end\\\n")
    return path


def lm_score(words: list[str], unigrams: dict[str, float], end: float = -1.0) -> float:
    """log10 P(words) of `write_arpa`'s model: its only bigram is of the first word at the beginning."""
    first = next(iter(unigrams))
    score = sum(-0.1 if i == 0 and word == first else unigrams.get(word, -5.0) for i, word in enumerate(words))
    return score + end


@pytest.fixture
def lexicon(tmp_path: Path) -> Path:
    path = tmp_path / "lexicon.txt"
    path.write_text(LEXICON)
    return path


def random_log_probs(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(*shape, len(SYMBOLS), generator=generator)
    logits[..., 1:4] = -30.0
    return logits.log_softmax(-1)


def best_sentence(log_probs: Tensor, options: LmOptions, unigrams: dict[str, float] | None) -> tuple[list[str], float]:
    """Best words by trying every path of [T, V]: log p of the path + weighted model + word score."""
    spellings = {(A, B, BAR): "AB", (A, BAR): "A", (B, A, BAR): "BA"}
    best: tuple[list[str], float] = ([], -math.inf)
    for path in itertools.product((BLANK, BAR, A, B), repeat=len(log_probs)):
        tokens = [s for s, _ in itertools.groupby(path) if s != BLANK]
        words = _parse(tokens, spellings)
        if words is None:
            continue
        score = sum(float(log_probs[t, s]) for t, s in enumerate(path)) + options.word_score * len(words)
        if unigrams is not None:
            score += options.lm_weight * lm_score(words, unigrams)
        if score > best[1]:
            best = (words, score)
    return best


def _parse(tokens: list[int], spellings: dict[tuple[int, ...], str]) -> list[str] | None:
    """Words that tokens spell; the sign between words may also stand alone."""
    words, rest = [], list(tokens)
    while rest:
        if rest[0] == BAR:
            rest = rest[1:]
            continue
        for spelling, word in spellings.items():
            if tuple(rest[: len(spelling)]) == spelling:
                words.append(word)
                rest = rest[len(spelling) :]
                break
        else:
            return None
    return words


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("lm_weight", "word_score"), [(0.0, 0.0), (1.5, 0.0), (0.7, 1.0), (0.0, -2.0)])
def test_lexicon_search_finds_the_best_words(
    seed: int, lm_weight: float, word_score: float, lexicon: Path, tmp_path: Path
) -> None:
    pytest.importorskip("flashlight.lib.text")
    pytest.importorskip("kenlm")
    unigrams = UNIGRAMS if lm_weight else None
    model = write_arpa(tmp_path / "words.arpa", UNIGRAMS) if lm_weight else None
    options = LmOptions(lexicon, model, lm_weight, word_score, beam=200, beam_threshold=1e3)
    log_probs = random_log_probs(seed, 6)
    words, score = best_sentence(log_probs, options, unigrams)
    search = LexiconLmSearch(SYMBOLS, BLANK, options)
    found = search(log_probs[None], None, nbest=3)[0]
    assert list(found[0].words or ()) == words
    assert found[0].score == pytest.approx(score, abs=1e-3)
    assert len({(h.words, tuple(h.tokens.tolist())) for h in found}) == len(found) == 3
    assert found[0].score >= found[1].score >= found[2].score
    for h in found:  # the alignment is of the hypothesis' own symbols
        total = sum(float(log_probs[s:e, k].sum()) for s, e, k in zip(h.timesteps, h.ends, h.tokens, strict=True))
        assert float(h.positional_scores.sum()) == pytest.approx(total, abs=1e-4)


def test_the_language_model_decides_between_words(lexicon: Path, tmp_path: Path) -> None:
    """Effect: AB and BA sound alike here; each model says its word, and a word score splits or joins."""
    pytest.importorskip("flashlight.lib.text")
    pytest.importorskip("kenlm")
    probabilities = torch.full((1, 3, len(SYMBOLS)), 1e-4)
    probabilities[0, 0, [A, B]] = probabilities[0, 1, [A, B]] = 0.5
    probabilities[0, 2, BAR] = 1.0
    log_probs = (probabilities / probabilities.sum(-1, keepdim=True)).log()
    for word, other in (("AB", "BA"), ("BA", "AB")):
        model = write_arpa(tmp_path / f"{word}.arpa", {word: -0.1, other: -3.0})
        search = LexiconLmSearch(SYMBOLS, BLANK, LmOptions(lexicon, model, 1.0))
        assert search(log_probs, None)[0][0].words == (word,)
    again = search.weighted(0.0, 0.0)
    assert (again.options.lm_weight, search.options.lm_weight) == (0.0, 1.0)
    assert again(log_probs, None)[0][0].score > search(log_probs, None)[0][0].score


@pytest.mark.parametrize("seed", range(4))
def test_a_model_over_symbols_needs_no_lexicon(seed: int, tmp_path: Path) -> None:
    pytest.importorskip("flashlight.lib.text")
    pytest.importorskip("kenlm")
    log_probs = random_log_probs(seed, 1, 5)
    sums = {}
    for weight in (0.5, 3.0):
        unigrams = {"A": -0.1, "B": -2.0, "|": -1.0}
        model = write_arpa(tmp_path / "symbols.arpa", unigrams)
        scores = {}
        for path in itertools.product((BLANK, BAR, A, B), repeat=5):
            tokens = tuple(s for s, _ in itertools.groupby(path) if s != BLANK)
            score = sum(float(log_probs[0, t, s]) for t, s in enumerate(path))
            score += weight * lm_score([SYMBOLS[s] for s in tokens], unigrams)
            scores[tokens] = max(score, scores.get(tokens, -math.inf))
        best = sorted(scores, key=lambda tokens: -scores[tokens])[:3]
        found = LexiconLmSearch(SYMBOLS, BLANK, LmOptions(None, model, weight, beam=500, beam_threshold=1e3))(
            log_probs, None, nbest=3
        )[0]
        assert [tuple(h.tokens.tolist()) for h in found] == best and found[0].words is None
        assert [h.score for h in found] == pytest.approx([scores[tokens] for tokens in best], abs=1e-3)
        sums[weight] = found[0].score
    assert sums[3.0] < sums[0.5]


def test_padded_is_unpadded_and_silence_is_empty(lexicon: Path) -> None:
    pytest.importorskip("flashlight.lib.text")
    search = LexiconLmSearch(SYMBOLS, BLANK, LmOptions(lexicon, beam=20))
    lengths = [7, 4, 0]
    log_probs = random_log_probs(4, 3, 7)
    mask = torch.arange(7) >= torch.tensor(lengths)[:, None]
    log_probs[mask] = math.nan
    batch = search(log_probs, mask, nbest=2)
    for row, length in enumerate(lengths[:2]):
        for one, other in zip(batch[row], search(log_probs[row : row + 1, :length], None, nbest=2)[0], strict=True):
            assert one.tokens.equal(other.tokens) and one.words == other.words and one.score == other.score
            assert one.timesteps.equal(other.timesteps) and one.ends.equal(other.ends)
    assert batch[2][0].tokens.tolist() == [] and batch[2][0].words == ()


def test_spellings_of_pieces_and_variants(tmp_path: Path) -> None:
    pytest.importorskip("flashlight.lib.text")
    symbols = ["<s>", "<pad>", "</s>", "<unk>", "▁A", "B", "▁AB"]
    path = tmp_path / "pieces.txt"
    path.write_text("AB\t▁A B\nAB\t▁AB\nA\t▁A\n")
    assert read_lexicon(path, {s: i for i, s in enumerate(symbols)}) == {"AB": [[4, 5], [6]], "A": [[4]]}
    search = LexiconLmSearch(symbols, BLANK, LmOptions(path))
    for spelled in ([4, 5, 4], [6, 0, 4]):
        log_probs = torch.full((1, 3, 7), -8.0)
        log_probs[0, torch.arange(3), torch.tensor(spelled)] = -0.01
        assert search(log_probs, None)[0][0].words == ("AB", "A")


def test_a_word_that_breaks_off_is_not_said(lexicon: Path) -> None:
    pytest.importorskip("flashlight.lib.text")
    log_probs = torch.full((1, 5, len(SYMBOLS)), -30.0)
    log_probs[0, torch.arange(5), torch.tensor([A, BAR, BLANK, A, B])] = -0.01
    hypothesis = LexiconLmSearch(SYMBOLS, BLANK, LmOptions(lexicon, beam_threshold=5.0))(log_probs, None)[0][0]
    assert (hypothesis.words, hypothesis.tokens.tolist()) == (("A",), [A, BAR])


def test_lexicons_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "lexicon.txt"
    symbols = {"A": 5, "|": 4}
    path.write_text("AB\tA B |\nC\tC |\nB\tB |\n")
    with pytest.raises(ValueError, match=r"it has no 'B' \(line 1\), 'C' \(line 2\); its symbols are A \|: mind upper"):
        read_lexicon(path, symbols)
    path.write_text("A\tA |\nAA\n")
    with pytest.raises(ValueError, match=r"lexicon\.txt:2: a line of a lexicon must be a word, a tab .* but is 'AA'"):
        read_lexicon(path, symbols)
    path.write_text("")
    with pytest.raises(ValueError, match=r"a lexicon must have a word at least, but .* is empty"):
        read_lexicon(path, symbols)
    with pytest.raises(ValueError, match="the lexicon must be a readable UTF-8 file, but"):
        read_lexicon(tmp_path / "none.txt", symbols)


def test_language_models_that_do_not_fit(lexicon: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("flashlight.lib.text")
    pytest.importorskip("kenlm")

    def build(lexicon: Path | None, unigrams: dict[str, float]) -> LexiconLmSearch:
        model = write_arpa(tmp_path / "model.arpa", unigrams)
        return LexiconLmSearch(SYMBOLS, BLANK, LmOptions(lexicon, model, 1.0))

    with pytest.raises(
        ValueError, match=r"must know the words of the lexicon, but knows none of AB A BA; a model over"
    ):
        build(lexicon, {"ab": -1.0, "a": -1.0})
    with pytest.raises(
        ValueError, match=r"must know the symbols of the model, but knows none of \| B; a model over words needs"
    ):
        build(None, {"A": -1.0})
    build(lexicon, {"AB": -1.0})
    assert "2 of the 3 words of the lexicon are unknown to" in caplog.text
    (tmp_path / "no.arpa").write_text("nonsense")
    with pytest.raises(ValueError, match=r"must be an \.arpa file or KenLM's own binary, but .*no\.arpa is not"):
        LexiconLmSearch(SYMBOLS, BLANK, LmOptions(lexicon, tmp_path / "no.arpa", 1.0))
    with pytest.raises(ValueError, match=r"the language model must be a file, but .*missing is none"):
        LexiconLmSearch(SYMBOLS, BLANK, LmOptions(lexicon, tmp_path / "missing", 1.0))


def test_options_out_of_range(lexicon: Path) -> None:
    with pytest.raises(ValueError, match="needs `lexicon`, `ngram_lm` or both, but has neither"):
        LmOptions()
    with pytest.raises(ValueError, match=r"`lm_weight` is 2.0, but there is no `ngram_lm` to weigh"):
        LmOptions(lexicon, lm_weight=2.0)
    with pytest.raises(
        ValueError, match=r"`lm_weight` must be a number of at least 0 and `word_score` a number, but are -1.0"
    ):
        LmOptions(lexicon, "lm.arpa", -1.0)
    with pytest.raises(ValueError, match=r"`word_score` is 1\.0, but words are a lexicon's"):
        LmOptions(None, "lm.arpa", 1.0, 1.0)
    with pytest.raises(ValueError, match="`beam` must be above 0, but is 0"):
        LmOptions(lexicon, beam=0)


def test_without_flashlight_the_pip_line_is_named(lexicon: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashlight.lib.text.decoder", None)
    with pytest.raises(RuntimeError, match=r"needs flashlight, which does not load.*pip install 's3distill\[decode\]'"):
        LexiconLmSearch(SYMBOLS, BLANK, LmOptions(lexicon))
