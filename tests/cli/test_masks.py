"""`s3distill masks`: packing real runs, listing, checking, taking apart; every refusal is one line and changes nothing."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("fairseq")

import s3distill
from s3distill import compat
from s3distill.cli import masks
from s3distill.cli.main import main
from s3distill.encoder.checkpoint import parse_checkpoint
from s3distill.encoder.config import LayerConfig
from s3distill.masks.bank import MaskBank
from s3distill.masks.masked_model import MaskedModel
from s3distill.masks.state import read_masks
from tests.masks import runs
from tests.masks.banks import CONFIG, NUM_PARAMETERS, make_backbone, make_entry

SYMBOLS = ["<s>", "<pad>", "</s>", "<unk>", *runs.LETTERS]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a backbone and the runs nl and fr over it."""
    folder = tmp_path_factory.mktemp("trained")
    data = runs.write_corpus(folder / "data")
    backbone = runs.write_backbone(folder / "backbone.pt")
    runs.write_run(folder / "nl.pt", backbone, data, seed=1)
    runs.write_run(folder / "fr.pt", backbone, data, seed=2, **runs.EVERYTHING, prune_rate=0.8)
    return folder


@pytest.fixture
def bank(trained: Path, tmp_path: Path) -> Path:
    """A bank with nl and fr."""
    path = tmp_path / "bank.safetensors"
    for name in ("nl", "fr"):
        assert main(["masks", "pack", str(trained / f"{name}.pt"), "--name", name, "--bank", str(path)]) == 0
    return path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Runs a command that must fail; returns its one line."""
    capsys.readouterr()
    assert main(["masks", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("s3distill masks: error: ") and err.count("\n") == 1, err
    return err


def printed(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    capsys.readouterr()
    assert main(["masks", *map(str, arguments)]) == 0
    return capsys.readouterr().out


# --- pack


def test_a_packed_entry_holds_what_the_run_trained(trained: Path, bank: Path) -> None:
    for name, num_masks in (("nl", 13), ("fr", 22)):
        run = parse_checkpoint(compat.load_checkpoint(trained / f"{name}.pt"))
        backbone = parse_checkpoint(compat.load_checkpoint(trained / "backbone.pt")).encoder_state
        entry = MaskBank.open(bank).entry(name)
        expected = read_masks(run)
        assert list(entry.masks) == list(expected) and len(expected) == num_masks
        assert all(torch.equal(entry.masks[m], mask) for m, mask in expected.items())
        moved = {f"w2v_model.{k}": v for k, v in run.encoder_state.items() if not torch.equal(v, backbone[k])}
        assert run.head_state is not None
        assert entry.tensors.keys() == moved.keys() | {"proj.weight", "proj.bias"}
        assert all(torch.equal(entry.tensors[k], v) for k, v in moved.items())
        assert ("w2v_model.encoder.layers.1.fc1.bias" in moved) is (name == "fr")
        assert entry.symbols == SYMBOLS
        kept = sum(int(m.sum()) for m in expected.values()) / sum(m.numel() for m in expected.values())
        info = entry.info
        assert info["density"] == pytest.approx(kept, abs=1e-6) and kept == pytest.approx(
            0.5 if name == "nl" else 0.8, abs=0.01
        )
        assert (info["pattern"], info["labels"], info["kind"], info["weights_dtype"]) == (
            "unstructured",
            "ltr",
            "ctc",
            "float32",
        )
        assert info["source"] == str(trained / f"{name}.pt") and info["date"][:2] == "20" and info["normalize"] is False


def test_the_report_says_what_it_costs(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, "pack", trained / "nl.pt", "--name", "nl", "--bank", tmp_path / "new" / "bank.st")
    assert "nl: 13 masks (unstructured) keep 50." in out and "% of 14,848 connections" in out
    assert "against" in out and "in 1 separate models" in out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_run_in_half_precision_is_packed(dtype: torch.dtype, trained: Path, tmp_path: Path) -> None:
    """Rounding is no training: the entry must not hold the whole backbone. What a trainer saves is float32, whatever it ran in."""
    run = runs.write_run(tmp_path / "half.pt", trained / "backbone.pt", trained / "data", dtype=dtype)
    assert {value.dtype for value in torch.load(run, weights_only=False)["model"].values()} == {torch.float32}
    assert main(["masks", "pack", str(run), "--name", "half", "--bank", str(tmp_path / "bank")]) == 0
    bank = MaskBank.open(tmp_path / "bank")
    assert bank.tensor_names("half") == ["w2v_model.mask_emb", "proj.weight", "proj.bias"]
    assert (
        bank.info("half")["weights_dtype"] == str(dtype).removeprefix("torch.")
        and bank.tensor("half", "proj.weight").dtype == dtype
    )
    model = MaskedModel.load(s3distill.load(trained / "backbone.pt"), bank).use("half")
    expected = s3distill.load(run)
    for (name, mine), theirs in zip(model.encoder.named_parameters(), expected.encoder.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_a_run_without_a_dictionary_takes_one(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(trained / "nl.pt", weights_only=False)
    torch.save({**state, "task_state": {}}, tmp_path / "run.pt")
    command = ["pack", tmp_path / "run.pt", "--bank", tmp_path / "bank", "--name"]
    assert "bare has no dictionary: decoding will take the data's; pass --dict" in printed(capsys, *command, "bare")
    assert "no dictionary" not in printed(capsys, *command, "full", "--dict", trained / "data" / "dict.ltr.txt")
    bank = MaskBank.open(tmp_path / "bank")
    assert bank.symbols("bare") is None and bank.symbols("full") == SYMBOLS
    (tmp_path / "short.txt").write_text("A 1\n")
    err = refused(capsys, *command, "short", "--dict", tmp_path / "short.txt")
    assert "the head of 'short' must have an output for each of its 5 symbols, but has 10" in err


def test_a_dictionary_must_be_the_runs_own(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["pack", trained / "nl.pt", "--bank", tmp_path / "bank", "--name", "nl", "--dict"]
    letters = [f"{letter} 1" for letter in runs.LETTERS]
    for lines, part in (
        ([*letters[:-1], "Q 1"], "differs in ['E', 'Q']; leave out --dict"),
        (letters[::-1], "differs in the order of its symbols"),
    ):
        (tmp_path / "wrong.txt").write_text("\n".join(lines) + "\n")
        err = refused(capsys, *command, tmp_path / "wrong.txt")
        assert (
            "wrong.txt must be the dictionary of" in err and "nl.pt, which carries its own, but" in err and part in err
        )
        assert not (tmp_path / "bank").exists()
    printed(capsys, *command, trained / "data" / "dict.ltr.txt")
    assert MaskBank.open(tmp_path / "bank").symbols("nl") == SYMBOLS


def test_a_head_for_utterances_is_packed_with_its_classes(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(trained / "nl.pt", weights_only=False)
    state["cfg"]["model"]["_name"] = "wav2vec_label_st"  # its keys are the same
    state["task_state"] = {"classes": [f"c{i}" for i in range(10)]}
    torch.save(state, tmp_path / "run.pt")
    bank = tmp_path / "bank"
    assert main(["masks", "pack", str(tmp_path / "run.pt"), "--name", "who", "--bank", str(bank)]) == 0
    model = MaskedModel.load(s3distill.load(trained / "backbone.pt"), bank).use("who")
    waveforms, lengths = torch.randn(2, 8000, generator=torch.Generator().manual_seed(0)), torch.tensor([8000, 5000])
    with torch.no_grad():
        logits, expected = (
            model(waveforms, lengths).logits,
            s3distill.load(tmp_path / "run.pt")(waveforms, lengths).logits,
        )
    assert logits.shape == (2, 10) and model.symbols == state["task_state"]["classes"]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert "bake makes wav2vec_ctc models, but this head is for classification" in refused(
        capsys, "bake", tmp_path / "run.pt", tmp_path / "dense.pt"
    )


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"co_train": True}, "of 13 of its 13 masked modules"),
        ({"trainable_post_extract_proj": True}, r"of 1 of its 13 masked modules (w2v_model.post_extract_proj)"),
        (
            {"trainable_pos": True, "no_prune_pos": False},
            r"of 1 of its 14 masked modules (w2v_model.encoder.pos_conv.0)",
        ),
    ],
)
def test_a_run_that_trained_masked_weights_is_refused(
    options: dict[str, bool], named: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs.write_run(tmp_path / "run.pt", trained / "backbone.pt", trained / "data", **options)
    err = refused(capsys, "pack", run, "--name", "nl", "--bank", tmp_path / "bank")
    assert (
        "masks mean W * mask over the backbone's own weights" in err
        and named in err
        and "s3distill masks bake RUN OUT" in err
    )
    assert not (tmp_path / "bank").exists()
    assert main(["masks", "bake", str(run), str(tmp_path / "dense.pt")]) == 0
    waveforms = torch.randn(1, 8000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense, expected = (s3distill.load(path)(waveforms).logits for path in (tmp_path / "dense.pt", run))
    torch.testing.assert_close(dense, expected, rtol=1e-5, atol=1e-5)


def test_trained_weights_without_a_mask_are_packed(trained: Path, tmp_path: Path) -> None:
    options = {"fix_attn": True, "trainable_if_unpruned": True, "no_prune_post_extract_proj": True}
    run = runs.write_run(tmp_path / "run.pt", trained / "backbone.pt", trained / "data", **options)
    assert main(["masks", "pack", str(run), "--name", "nl", "--bank", str(tmp_path / "bank")]) == 0
    bank = MaskBank.open(tmp_path / "bank")
    assert "w2v_model.encoder.layers.0.self_attn.q_proj.weight" in bank.tensor_names("nl")
    model = MaskedModel.load(s3distill.load(trained / "backbone.pt"), bank).use("nl")
    for (name, mine), theirs in zip(
        model.encoder.named_parameters(), s3distill.load(run).encoder.parameters(), strict=True
    ):
        assert torch.equal(mine, theirs), name


def test_what_cannot_be_packed_is_refused(
    trained: Path, bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = bank.read_bytes()
    nl, pack = trained / "nl.pt", ("--bank", bank, "--name")
    assert "has 'nl' already, and an entry is never overwritten" in refused(
        capsys, "pack", tmp_path / "not_even_read.pt", *pack, "nl"
    )
    assert "a name in a mask bank must begin with a letter or digit" in refused(capsys, "pack", nl, *pack, "a/b")
    assert "run.pt does not exist" in refused(capsys, "pack", tmp_path / "run.pt", *pack, "de")
    assert "backbone.pt cannot be packed: it must be a run of wav2vec_ctc_st" in refused(
        capsys, "pack", trained / "backbone.pt", *pack, "de", "--backbone", trained / "backbone.pt"
    )
    # another backbone, with the same run: refused by the bank, and where there is no bank by the weights
    other = runs.write_backbone(tmp_path / "other.pt", seed=5)
    assert "belongs to the backbone with checksum" in refused(capsys, "pack", nl, *pack, "de", "--backbone", other)
    err = refused(capsys, "pack", nl, "--bank", tmp_path / "new", "--name", "de", "--backbone", other)
    assert "of 13 of its 13 masked modules" in err and "other.pt" in err
    small = runs.write_backbone(tmp_path / "small.pt", encoder_layers=1)
    err = refused(capsys, "pack", nl, "--bank", tmp_path / "new", "--name", "de", "--backbone", small)
    assert "tensors are not in both, or of another shape (encoder.layers.1." in err
    assert bank.read_bytes() == before and not (tmp_path / "new").exists()


def test_a_run_whose_backbone_is_gone_names_the_option(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(trained / "nl.pt", weights_only=False)
    state["cfg"]["model"]["w2v_path"] = "gone.pt"
    torch.save(state, tmp_path / "moved.pt")
    command = ["pack", tmp_path / "moved.pt", "--name", "nl", "--bank", tmp_path / "bank"]
    assert "its model.w2v_path 'gone.pt' is not here; pass --backbone FILE" in refused(capsys, *command)
    printed(capsys, *command, "--backbone", trained / "backbone.pt")


# --- list


def test_the_json_counts_every_byte(bank: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listing = json.loads(printed(capsys, "list", "--bank", bank, "--json"))
    backbone = parse_checkpoint(compat.load_checkpoint(trained / "backbone.pt"))
    num_parameters = sum(t.numel() for t in backbone.encoder_state.values())
    assert (
        listing["backbone"]["bytes"] == 4 * num_parameters and listing["backbone"]["num_parameters"] == num_parameters
    )
    assert [m["name"] for m in listing["masks"]] == ["nl", "fr"]
    assert [m["num_masks"] for m in listing["masks"]] == [13, 22] and listing["masks"][0]["num_symbols"] == 10
    for mask in listing["masks"]:
        assert mask["bytes"] == mask["mask_bytes"] + mask["tensor_bytes"]
    assert listing["masks"][0]["mask_bytes"] == 14_848 // 8
    assert listing["bank_bytes"] == os.path.getsize(bank)
    assert listing["bank_bytes"] == sum(m["bytes"] for m in listing["masks"]) + listing["header_bytes"]
    assert listing["total_bytes"] == listing["backbone"]["bytes"] + os.path.getsize(bank)
    models = [s3distill.load(trained / f"{name}.pt") for name in ("nl", "fr")]
    assert listing["separate_bytes"] == sum(4 * p.numel() for model in models for p in model.parameters())
    assert listing["saved"] == pytest.approx(1 - listing["total_bytes"] / listing["separate_bytes"])
    assert listing == masks.describe(MaskBank.open(bank)) == json.loads(printed(capsys, "list", bank, "--json"))


def test_the_table_names_every_entry(bank: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, "list", "--bank", bank)
    assert "nl" in out and "fr" in out and "50." in out and "unstructured" in out and "% saved" in out
    empty = bank.with_name("empty")
    MaskBank.create(empty, "ab" * 32, 10)
    assert "0.0% saved" in printed(capsys, "list", "--bank", empty)


def test_a_terminal_does_not_obey_a_bank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = "run\x1b[2J\x9b2J\u202e\n\u2028.pt"
    bank = tmp_path / "bank"
    MaskBank.create(bank, "ab" * 32, NUM_PARAMETERS, [make_entry("nl", source=source, labels="\x7f", more="\x85 é")])
    out = printed(capsys, "list", bank)
    assert r"run\u001b[2J\u009b2J\u202e\n\u2028.pt" in out
    assert all(c.isprintable() for line in out.split("\n") for c in line)
    out = printed(capsys, "list", bank, "--json")
    assert all(c.isprintable() for line in out.split("\n") for c in line) and "é" in out
    assert json.loads(out)["masks"][0]["source"] == source


# --- verify, extract, remove


def test_verify_finds_what_is_wrong(
    bank: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "2 entries, no faults" in printed(capsys, "verify", "--bank", bank) == printed(capsys, "verify", bank)
    assert "no faults, all over" in printed(capsys, "verify", "--bank", bank, "--backbone", trained / "backbone.pt")
    other = runs.write_backbone(tmp_path / "other.pt", seed=5)
    assert main(["masks", "verify", "--bank", str(bank), "--backbone", str(other)]) == 1
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "belongs to the backbone with checksum" in out and "other.pt has" in out
    contents = bytearray(bank.read_bytes())
    contents[-3] ^= 1
    bank.write_bytes(contents)
    assert main(["masks", "verify", "--bank", str(bank)]) == 1
    out = capsys.readouterr().out
    assert "must be those that were packed, but are not" in out
    (damaged,) = (name for name in ("nl", "fr") if f"{name!r}" in out)
    whole = ({"nl", "fr"} - {damaged}).pop()
    given = ("--bank", bank, "--name", damaged)
    assert f"{damaged!r} in mask bank" in refused(capsys, "extract", *given, tmp_path / "alone")
    given = (*given, "--backbone", trained / "backbone.pt")
    assert "is damaged: its bytes must be those that were packed" in refused(capsys, "bake", *given, tmp_path / "dense")
    assert not (tmp_path / "alone").exists() and not (tmp_path / "dense").exists()
    printed(capsys, "extract", "--bank", bank, "--name", whole, tmp_path / "alone")
    bank.write_bytes(contents[:-1])
    assert "is truncated, damaged or something else" in refused(capsys, "verify", "--bank", bank)


def test_extract_and_remove(bank: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = tmp_path / "fr.safetensors"
    assert "wrote" in printed(capsys, "extract", "--bank", bank, "--name", "fr", alone)
    assert MaskBank.open(alone).names == ["fr"]
    printed(capsys, "verify", "--bank", alone, "--backbone", trained / "backbone.pt")
    assert "must not be there yet" in refused(capsys, "extract", "--bank", bank, "--name", "fr", alone)
    assert "removed fr from" in printed(capsys, "remove", "--bank", bank, "--name", "fr")
    assert MaskBank.open(bank).names == ["nl"]
    before = bank.read_bytes()
    for command in (("remove",), ("extract", tmp_path / "x")):
        assert "has no 'fr'; it has nl" in refused(capsys, command[0], "--bank", bank, "--name", "fr", *command[1:])
    assert bank.read_bytes() == before and not (tmp_path / "x").exists()
    assert "does not exist; check the path" in refused(capsys, "list", "--bank", tmp_path / "gone")


# --- similarity


def test_similarity_takes_its_bank_as_list_does(bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("scipy")
    one, two = (printed(capsys, "similarity", *given, "-o", tmp_path / "out") for given in ((bank,), ("--bank", bank)))
    assert one == two and "nl fr: kappa" in one.replace("fr nl", "nl fr")


# --- bake (that it decodes the same: tests/tasks/test_mask_bank_decoding.py)


def test_both_ways_of_baking_give_the_same_model(bank: Path, trained: Path, tmp_path: Path) -> None:
    """From the run, with the network that trained it, and from the bank over the backbone."""
    for name in ("nl", "fr"):
        files = [tmp_path / f"{name}_{source}.pt" for source in ("run", "bank")]
        assert main(["masks", "bake", str(trained / f"{name}.pt"), str(files[0])]) == 0
        given = ["--bank", str(bank), "--name", name, "--backbone", str(trained / "backbone.pt")]
        assert main(["masks", "bake", *given, str(files[1])]) == 0
        states = [torch.load(file, weights_only=False) for file in files]
        assert states[0]["cfg"] == states[1]["cfg"]
        assert (
            states[0]["task_state"]["target_dictionary"].symbols == states[1]["task_state"]["target_dictionary"].symbols
        )
        assert states[0]["model"].keys() == states[1]["model"].keys()
        for key, value in states[0]["model"].items():
            torch.testing.assert_close(value, states[1]["model"][key], rtol=1e-6, atol=1e-8)


def test_a_compact_student_of_mixed_widths_needs_our_user_dir(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(CONFIG, layers=(LayerConfig(2, 8, 24), LayerConfig(1, 8, 16)))
    student, run, bank, dense = (tmp_path / name for name in ("student.pt", "run.pt", "bank", "dense.pt"))
    options = {"_name": "ssl_student", "encoder": config.to_json(), "normalize": False}
    compat.write_checkpoint(
        student, make_backbone(0, config).encoder_state, options, {"_name": "audio_distill", "normalize": False}
    )
    runs.write_run(run, student, trained / "data")
    printed(capsys, "pack", run, "--name", "nl", "--bank", bank)
    assert "load it with --user-dir s3distill" in printed(capsys, "bake", run, dense)
    waveforms = torch.randn(1, 8000, generator=torch.Generator().manual_seed(0))
    masked = MaskedModel.load(s3distill.load(student), bank).use("nl")
    with torch.no_grad():
        expected = s3distill.load(run)(waveforms).logits
        for model in (masked, s3distill.load(dense)):
            torch.testing.assert_close(model(waveforms).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}"], "masks come from a run (s3distill masks bake RUN OUT) or from a bank"),
        (["{run}", "{out}", "--bank", "{bank}"], "given are 2 paths and --bank"),
        (["{run}", "{out}", "more"], "given are 3 paths and no option"),
        (["--bank", "{bank}", "--name", "nl", "{out}"], "given are 1 paths and --bank, --name"),
        (["{run}", "{run}"], "OUT must be another file than what is read"),
        (
            ["--bank", "{bank}", "--name", "nl", "--backbone", "{backbone}", "{bank}"],
            "OUT must be another file than what is read",
        ),
        (["{backbone}", "{out}"], "must have masks to bake, but has none (model 'wav2vec2'): it is dense already"),
        (["--bank", "{bank}", "--name", "xx", "--backbone", "{backbone}", "{out}"], "has no 'xx'; it has nl, fr"),
        (["--bank", "{bank}", "--name", "nl", "--backbone", "{run}", "{out}"], "belongs to the backbone with checksum"),
    ],
)
def test_what_cannot_be_baked_is_refused(
    arguments: list[str], message: str, bank: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"run": trained / "nl.pt", "backbone": trained / "backbone.pt", "bank": bank, "out": tmp_path / "out.pt"}
    before = {name: path.read_bytes() for name, path in files.items() if path.exists()}
    assert message in refused(capsys, "bake", *(a.format(**files) for a in arguments))
    assert not files["out"].exists() and all(files[name].read_bytes() == contents for name, contents in before.items())


def test_a_failed_bake_leaves_the_old_file(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "dense.pt"
    output.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(torch, "save", fail)
    assert main(["masks", "bake", str(trained / "nl.pt"), str(output)]) == 2
    assert output.read_text() == "old" and os.listdir(tmp_path) == ["dense.pt"]


def test_the_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["masks", "--help"], ["masks", "bake", "--help"]):
        with pytest.raises(SystemExit) as done:
            main(arguments)
        assert done.value.code == 0
    out = capsys.readouterr().out
    assert all(f"\n    {name} " in out for name in ("pack", "list", "verify", "extract", "remove", "bake"))
