"""Loading runs no code and reads every layout, files are written whole, all names register in any order of imports."""

from __future__ import annotations

import argparse
import builtins
import collections
import copy
import dataclasses
import json
import os
import pickle
import random
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("fairseq")

import fairseq.utils
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.file_io import PathManager
from fairseq.logging.meters import AverageMeter
from omegaconf import DictConfig, OmegaConf

import s3distill
from s3distill import compat
from s3distill.compat import loading, repairs
from s3distill.encoder.checkpoint import parse_checkpoint
from tests.encoder import checkpoints

REPOSITORY = Path(s3distill.__file__).parents[1]

Loader = Callable[[Path], Any]
LOADERS: dict[str, Loader] = {
    "ours": compat.load_checkpoint,
    "stock": lambda path: checkpoint_utils.load_checkpoint_to_cpu(str(path)),
    "ensemble": lambda path: checkpoint_utils.load_model_ensemble_and_task([str(path)]),
}
every_loader = pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS.keys())
both_formats = pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "old_format"])

MAKERS = {"pretrained": checkpoints.pretrained, "fine_tuned": checkpoints.fine_tuned}
STYLES = {"dict": dict, "dictconfig": checkpoints.with_dictconfig, "args": checkpoints.with_args}
LAYOUTS = [
    pytest.param(kind, family, style, id=f"{kind}-{family}-{style}")
    for kind in MAKERS
    for family in checkpoints.FAMILIES
    for style in STYLES
    if style != "args" or family == "wav2vec2"  # the other families came after hydra
]


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    return checkpoints.pretrained("wav2vec2")[0]


@both_formats
@pytest.mark.parametrize(("kind", "family", "style"), LAYOUTS)
def test_every_layout_loads(kind: str, family: str, style: str, as_zip: bool, tmp_path: Path) -> None:
    written, model = MAKERS[kind](family, normalize=True)
    path = checkpoints.save(STYLES[style](written), tmp_path / "checkpoint.pt", as_zip)

    plain = compat.load_checkpoint(path)
    assert_plain(plain)
    parsed = parse_checkpoint(plain, str(path))
    assert (parsed.family, parsed.normalize) == (family, True)
    assert (parsed.head_state is not None) == (kind == "fine_tuned")
    own = {k.removeprefix("w2v_encoder.w2v_model."): v for k, v in model.named_parameters()}
    for name, value in parsed.encoder_state.items():
        assert torch.equal(value, own[name])

    stock = LOADERS["stock"](path)
    assert isinstance(stock["cfg"], DictConfig)
    if kind == "fine_tuned":
        assert parsed.symbols is not None and tuple(parsed.symbols[4:]) == checkpoints.LETTERS
        dictionary = stock["task_state"]["target_dictionary"]
        assert isinstance(dictionary, Dictionary) and dictionary.symbols == parsed.symbols
    (rebuilt,), _, _ = LOADERS["ensemble"](path)
    assert type(rebuilt) is type(model)
    theirs = dict(rebuilt.named_parameters())
    assert theirs.keys() == dict(model.named_parameters()).keys()
    for name, value in model.named_parameters():
        assert torch.equal(value, theirs[name]), name


def assert_plain(value: Any) -> None:
    if isinstance(value, dict):
        for k, v in value.items():
            assert_plain(k)
            assert_plain(v)
    elif isinstance(value, list):
        for v in value:
            assert_plain(v)
    else:
        assert value is None or isinstance(value, (str, int, float, bool, torch.Tensor)), type(value)


def test_other_data_types_of_fairseqs_checkpoints_load(state: dict, tmp_path: Path) -> None:
    """Meters, enums, defaultdicts, numpy scalars and config dataclasses, as older trainers wrote them."""
    from fairseq.data.text_compressor import TextCompressionLevel
    from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Config

    held = {
        "meter": AverageMeter(),
        "enum": TextCompressionLevel.high,
        "default": collections.defaultdict(float, {"a": 1.0}),
        "scalar": np.float64(2.5),
        "dtype_scalar": np.int64(3),
        "options": Wav2Vec2Config(encoder_layers=5),
    }
    path = checkpoints.save({**state, "extra_state": {**state["extra_state"], **held}}, tmp_path / "a.pt")
    ours = compat.load_checkpoint(path)["extra_state"]
    assert (ours["enum"], ours["default"]) == (TextCompressionLevel.high.value, {"a": 1.0})
    assert (ours["scalar"], ours["dtype_scalar"]) == (2.5, 3)
    assert ours["options"]["encoder_layers"] == 5 and ours["options"]["extractor_mode"] == "default"
    stock = LOADERS["stock"](path)["extra_state"]
    assert stock["enum"] is TextCompressionLevel.high and isinstance(stock["meter"], AverageMeter)
    assert stock["options"] == held["options"] and stock["scalar"] == 2.5


class OlderMember:
    """Pickles as a member of an enum does under Python before 3.11.4; or as another attribute of a class."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __reduce__(self) -> tuple:
        return getattr, self.arguments


def test_enums_of_older_pythons_load_and_no_other_attribute(state: dict, tmp_path: Path) -> None:
    from fairseq.data.text_compressor import TextCompressionLevel

    member = OlderMember(TextCompressionLevel, "high")
    path = checkpoints.save({**state, "extra_state": {"enum": member}}, tmp_path / "a.pt")
    assert compat.load_checkpoint(path)["extra_state"]["enum"] == TextCompressionLevel.high.value
    assert LOADERS["stock"](path)["extra_state"]["enum"] is TextCompressionLevel.high
    for arguments in ((TextCompressionLevel, "__subclasses__"), (collections.OrderedDict, "fromkeys")):
        path = checkpoints.save({**state, "extra_state": {"enum": OlderMember(*arguments)}}, tmp_path / "b.pt")
        with pytest.raises(ValueError, match=r"refused|cannot be read"):
            LOADERS["stock"](path)
    with pytest.raises(ValueError, match=r"refused|cannot be read"):
        compat.load_checkpoint(path)


def test_overrides_reach_both_styles(state: dict, tmp_path: Path) -> None:
    for style in ("dict", "args"):
        path = checkpoints.save(STYLES[style](state), tmp_path / f"{style}.pt")
        loaded = checkpoint_utils.load_checkpoint_to_cpu(str(path), {"dropout": 0.625})
        assert loaded["cfg"].model.dropout == 0.625


class Calls:
    """Pickles as the call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def ran() -> Path:
    """What the code inside the malicious files makes, in the current folder."""
    return Path("ran")


@pytest.fixture
def evil_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """Modules with side effects in allowed packages: one imported, one that only lies on the path."""
    monkeypatch.chdir(tmp_path)
    source = (
        "import dataclasses\nclass Class:\n    def __init__(self, *_): open('ran', 'w')\n    __setstate__ = __init__\n"
    )
    imported = types.ModuleType("fairseq.evil_for_tests")
    exec(source, imported.__dict__)
    monkeypatch.setitem(sys.modules, imported.__name__, imported)
    lying = tmp_path / "path" / "examples" / "lying_for_tests"
    lying.mkdir(parents=True)
    (lying / "__init__.py").write_text("open('ran', 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path / "path"))
    user_dir = tmp_path / "user_dir"
    user_dir.mkdir()
    (user_dir / "__init__.py").write_text("open('ran', 'w')\n")
    yield imported
    for name in ("user_dir", "examples", "examples.lying_for_tests"):
        sys.modules.pop(name, None)


def lying_class(base: type = object) -> type:
    """A dataclass that pickles under the name of a module that is not imported."""
    options = dataclasses.make_dataclass("Options", ["value"], bases=(base,))
    options.__module__ = "examples.lying_for_tests"
    return options


def save_named(state: Any, path: Path, as_zip: bool) -> None:
    """Saves objects whose classes pretend to be elsewhere: pickle looks them up, so they are there meanwhile."""
    package, module = types.ModuleType("examples"), types.ModuleType("examples.lying_for_tests")
    sys.modules.update({"examples": package, "examples.lying_for_tests": module})
    module.Options = type(state["extra"])  # type: ignore[attr-defined]
    try:
        checkpoints.save(state, path, as_zip)
    finally:
        del sys.modules["examples"], sys.modules["examples.lying_for_tests"]


ATTACKS = {
    "system": lambda _: Calls(os.system, "touch ran"),
    "eval": lambda _: Calls(builtins.eval, "open('ran', 'w')"),
    "getattr": lambda _: Calls(getattr, "text", "upper"),
    "open": lambda _: Calls(open, "ran", "w"),
    "import_user_module": lambda _: Calls(fairseq.utils.import_user_module, argparse.Namespace(user_dir="user_dir")),
    "eval_bool": lambda _: Calls(fairseq.utils.eval_bool, "open('ran', 'w')"),
    "check_output": lambda _: Calls(subprocess.check_output, ["touch", "ran"]),
    "load_checkpoint": lambda _: Calls(compat.load_checkpoint, "other.pt"),
    "defaultdict": lambda _: collections.defaultdict(eval, {}),
    "Class": lambda module: Calls(module.Class, 1),
}


PLACES = ["optimizer", "model", "task_state"]


@every_loader
@both_formats
@pytest.mark.parametrize(
    ("attack", "place"), [*((attack, "top") for attack in ATTACKS), *(("eval", place) for place in PLACES)]
)
def test_a_pickle_that_runs_code_is_refused_by_name(
    attack: str, as_zip: bool, loader: Loader, place: str, state: dict, evil_modules: types.ModuleType, tmp_path: Path
) -> None:
    evil = ATTACKS[attack](evil_modules)
    infected = copy.copy(state)
    if place == "top":
        infected["extra"] = evil
    elif place == "optimizer":
        infected["last_optimizer_state"] = {"state": {0: {"exp_avg": [evil]}}}
    elif place == "model":
        infected["model"] = {**state["model"], "encoder.bias": evil}
    else:
        infected["task_state"] = {"target_dictionary": (evil,)}
    path = checkpoints.save(infected, tmp_path / "evil.pt", as_zip)
    if attack == "Class" and loader is compat.load_checkpoint and as_zip:
        assert_plain(loader(path))  # read as inert data: any class of fairseq is, but none of its code runs
    else:
        named = {"system": "system", "defaultdict": "eval"}.get(attack, attack)
        with pytest.raises(ValueError, match="was refused: loading must not run code") as raised:
            loader(path)
        message = str(raised.value)
        assert named in message and str(path) in message and "If you trust the file, convert it" in message
    assert not ran().exists(), "code of the file ran"
    Path("works").touch()
    assert Path("works").exists()


@both_formats
@pytest.mark.parametrize("name", ["stock", "ensemble"])
def test_a_module_is_not_imported_on_a_files_word(
    name: str, as_zip: bool, state: dict, evil_modules: types.ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "evil.pt"
    save_named({**state, "extra": lying_class()(3)}, path, as_zip)
    with pytest.raises(ValueError, match=r"needs .*examples\.lying_for_tests\.Options"):
        LOADERS[name](path)
    assert not ran().exists()
    if as_zip:
        assert compat.load_checkpoint(path)["extra"] == {"value": 3}
    assert not ran().exists()
    import examples.lying_for_tests  # noqa: F401

    assert ran().exists(), "the module would have run code"


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("where", ["encoder", "outer"])
def test_an_option_that_fairseq_evaluates_must_be_a_literal(
    where: str, kind: str, style: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stock models call eval() on strings of their config."""
    monkeypatch.chdir(tmp_path)
    written, _ = MAKERS[kind]("wav2vec2")
    model = written["cfg"]["model"]
    if where == "encoder":
        options = model["w2v_args"]["model"] if kind == "fine_tuned" else model
        options["conv_feature_layers"] = f"[open('ran', 'w')] and {options['conv_feature_layers']}"
    else:
        model["adam_betas"] = "__import__('os').system('touch ran')"
    path = checkpoints.save(STYLES[style](written), tmp_path / "evil.pt")
    for name in ("stock", "ensemble"):
        with pytest.raises(
            ValueError, match="was refused: loading must not run code, but fairseq evaluates its option"
        ):
            LOADERS[name](path)
    if where == "encoder":
        with pytest.raises(ValueError, match="`conv_feature_layers` must be a list"):
            s3distill.load(path)
    assert not ran().exists()


@pytest.mark.parametrize(
    "value", [b"print(1)", "${model.other}", "9 ** 9 ** 9 ** 9", "f'{1}'", "[x for x in y]", "a.b"]
)
def test_other_ways_to_be_more_than_a_literal(value: Any, state: dict, tmp_path: Path) -> None:
    infected = {**state, "cfg": copy.deepcopy(state["cfg"])}
    infected["cfg"]["model"]["conv_feature_layers"] = value
    path = checkpoints.save(infected, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evaluates its option `conv_feature_layers`"):
        LOADERS["stock"](path)


@pytest.mark.parametrize(
    ("layers", "evil"),
    [
        ('"${common.evil}"', "\"+str(open('ran', 'w'))+\""),
        ("[(512,10,5) #${common.evil}\n]", "\n,open('ran', 'w')"),
    ],
)
def test_an_interpolation_cannot_carry_code_past_the_check(
    layers: str, evil: str, state: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quotes and comments make a literal of the unresolved text; what omegaconf makes of it is code."""
    monkeypatch.chdir(tmp_path)
    infected = {**state, "cfg": copy.deepcopy(state["cfg"])}
    infected["cfg"]["common"] = {**infected["cfg"].get("common", {}), "evil": evil}
    infected["cfg"]["model"]["conv_feature_layers"] = layers
    path = checkpoints.save(infected, tmp_path / "evil.pt")
    for name in ("stock", "ensemble"):
        with pytest.raises(ValueError, match="evaluates its option `conv_feature_layers`"):
            LOADERS[name](path)
    assert not ran().exists()


def test_a_resolver_is_not_called(state: dict, tmp_path: Path) -> None:
    infected = {**state, "cfg": copy.deepcopy(state["cfg"])}
    infected["cfg"]["model"] = "${oc.create:${oc.decode:'{_name: wav2vec2, conv_feature_layers: x}'}}"
    path = checkpoints.save(infected, tmp_path / "evil.pt")
    for name in ("stock", "ensemble"):
        with pytest.raises(ValueError, match=r"was refused: .* calls a resolver of omegaconf"):
            LOADERS[name](path)


@both_formats
@pytest.mark.parametrize("name", ["stock", "ensemble"])
def test_the_environment_cannot_switch_the_protection_off(
    name: str, as_zip: bool, state: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is what many set for fairseq on torch >= 2.6."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = checkpoints.save({**state, "extra": Calls(os.system, "touch ran")}, tmp_path / "evil.pt", as_zip)
    with pytest.raises(ValueError, match="was refused: loading must not run code"):
        LOADERS[name](path)
    assert not ran().exists()


def test_literals_stay_as_they_are(state: dict, tmp_path: Path) -> None:
    changed = {**state, "cfg": copy.deepcopy(state["cfg"])}
    values = {
        "wer_args": "('kenlm.bin', 'lexicon.txt', 2, -1)",
        "adam_betas": "(0.9, 0.98)",
        "adaptive_softmax_cutoff": "10000,50000",
        "left_pad_source": "True",
        "xformers_att_config": '{"name": "scaled_dot_product"}',
        "encoder_attention": "not an expression",
        "decoder_layers": 6,
    }
    changed["cfg"]["model"].update(values)
    loaded = LOADERS["stock"](checkpoints.save(changed, tmp_path / "a.pt"))
    assert {name: loaded["cfg"].model[name] for name in values} == values


def assert_unreadable(path: Path, rule: str) -> None:
    for name, loader in LOADERS.items():
        with pytest.raises(ValueError, match=rule) as raised:
            loader(path)
        assert str(path) in str(raised.value), name
        assert "\n" not in str(raised.value), name


CORRUPT = (
    "cannot be read: it must be a file that torch.save wrote, but it is corrupt or truncated .* copy or download it"
)


@both_formats
@pytest.mark.parametrize("share", [0.001, 0.3, 0.9, 0.99])
def test_a_truncated_file_is_named(share: float, as_zip: bool, state: dict, tmp_path: Path) -> None:
    path = checkpoints.save(state, tmp_path / "truncated.pt", as_zip)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert_unreadable(path, CORRUPT)


def _script(path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))


def _other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no tensors")


BROKEN: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello, this is no checkpoint\n" * 20),
    "html": lambda path: path.write_text("<!DOCTYPE html><html><body>404</body></html>"),
    "one_byte": lambda path: path.write_bytes(b"h"),
    "magic_only": lambda path: path.write_bytes(b"\x80\x02"),
    "newer_pickle": lambda path: path.write_bytes(pickle.dumps({"model": {}}, protocol=5)),
    "torchscript": _script,
    "other_zip": _other_zip,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_no_checkpoint_is_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.pt"
    BROKEN[name](path)
    assert_unreadable(path, CORRUPT)


@pytest.mark.filterwarnings("ignore")
def test_random_bytes_give_the_one_error(tmp_path: Path) -> None:
    path = tmp_path / "random.pt"
    generator = random.Random(0)
    for start in (b"", b"\x80\x02", b"\x80\x02}q\x00", b"PK\x03\x04", b"h\x05", b"(", b"cos\nsystem\n"):
        for _ in range(20):
            path.write_bytes(start + generator.randbytes(generator.randrange(1, 200)))
            assert_unreadable(path, "cannot be read|was refused")


@pytest.mark.filterwarnings("ignore")
@both_formats
def test_damaged_bytes_never_give_another_error(as_zip: bool, state: dict, tmp_path: Path) -> None:
    path = checkpoints.save({"model": {"weight": torch.ones(3)}, "optimizer_history": [{}]}, tmp_path / "a.pt", as_zip)
    content = path.read_bytes()
    generator = random.Random(1)
    num_refused = 0
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(3):
            damaged[generator.randrange(len(content))] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            compat.load_checkpoint(path)
        except ValueError as error:
            num_refused += 1
            assert str(path) in str(error)
    assert num_refused > 20


@pytest.mark.parametrize(
    ("held", "what"),
    [
        ([1, 2], "a list"),
        ({"weights": 1}, r"a dict with \['weights'\]"),
        (torch.ones(2), "a Tensor"),
        ("text", "a str"),
    ],
)
def test_a_file_without_a_model_is_named(held: Any, what: str, tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save(held, path)
    assert_unreadable(path, f"is not a checkpoint: it must hold a dict with the key 'model', but holds {what}")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"checkpoint .*gone\.pt does not exist; check the path"):
        compat.load_checkpoint(tmp_path / "gone.pt")
    with pytest.raises(FileNotFoundError, match=r"gone\.pt"):
        LOADERS["stock"](tmp_path / "gone.pt")
    with pytest.raises(FileNotFoundError):
        compat.load_checkpoint(tmp_path)


def test_errors_of_fairseq_itself_stay(state: dict, tmp_path: Path) -> None:
    """A readable checkpoint that fairseq cannot upgrade keeps fairseq's own error."""
    incomplete = {k: v for k, v in state.items() if k != "optimizer_history"}
    path = checkpoints.save(incomplete, tmp_path / "a.pt")
    with pytest.raises(KeyError, match="best_loss"):
        LOADERS["stock"](path)


def test_a_checkpoint_of_another_model_is_named(tmp_path: Path) -> None:
    for state, message in (
        ({"model": {}}, "holds no model weights"),
        ({"model": {"w": torch.ones(1)}}, "carries neither 'cfg' nor 'args'"),
        ({"model": {"w": torch.ones(1)}, "cfg": {"model": {"_name": "transformer"}}}, "is of model 'transformer'"),
    ):
        path = tmp_path / "a.pt"
        torch.save(state, path)
        with pytest.raises(ValueError, match=message) as raised:
            s3distill.load(path)
        assert str(path) in str(raised.value)


def write(path: Path, value: float) -> None:
    compat.write_checkpoint(
        path, {"weight": torch.full((2,), value)}, {"_name": "ssl_student"}, {"_name": "audio_distill"}
    )


def test_a_written_checkpoint_reads_back_everywhere(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "compact.pt"
    write(path, 3.0)
    assert list(path.parent.iterdir()) == [path]
    for name in ("ours", "stock"):
        state = LOADERS[name](path)
        assert state["model"]["weight"].tolist() == [3.0, 3.0]
        assert state["cfg"]["model"]["_name"] == "ssl_student" and state["cfg"]["task"]["_name"] == "audio_distill"
    assert not loading._types_in(path), "it needs nothing beyond torch's own types"


@pytest.mark.parametrize("broken", ["torch.save", "os.replace"])
def test_a_failing_write_leaves_the_old_file(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "compact.pt"
    write(path, 1.0)
    before = path.read_bytes()

    def fail(first: Any, second: Any, *_: Any, **__: Any) -> None:
        if broken == "torch.save":
            Path(second).write_bytes(b"half a che")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch if broken == "torch.save" else os, broken.split(".")[1], fail)
    with pytest.raises(OSError, match="No space left"):
        write(path, 2.0)
    monkeypatch.undo()
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_fairseqs_copy_replaces_files_whole(tmp_path: Path) -> None:
    source, target = tmp_path / "checkpoint_1_1.pt", tmp_path / "checkpoint_last.pt"
    source.write_text("new")
    target.write_text("old")
    seen = []

    def watching(src: str, dst: str, overwrite: bool = False) -> bool:
        Path(dst).write_text("ne")
        seen.append(target.read_text())
        Path(dst).write_text("new")
        return True

    assert repairs._atomic_copy(watching)(str(source), str(target), overwrite=True)
    assert seen == ["old"], "the target must stay whole while the copy is written"
    assert target.read_text() == "new"

    def failing(src: str, dst: str, overwrite: bool = False) -> bool:
        Path(dst).write_text("n")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        repairs._atomic_copy(failing)(str(source), str(target), overwrite=True)
    assert not repairs._atomic_copy(lambda *_, **__: False)(str(source), str(target), overwrite=True)
    assert target.read_text() == "new" and sorted(tmp_path.iterdir()) == [source, target]


def test_fairseqs_own_path_manager_copies_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "a.pt", tmp_path / "b.pt"
    source.write_text("new")
    target.write_text("old")
    replaced = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (replaced.append(Path(b)), replace(a, b)))
    assert PathManager.copy(str(source), str(target), overwrite=True)
    assert replaced == [target] and target.read_text() == "new" and source.exists()
    assert PathManager.copy(str(source), str(tmp_path / "c.pt"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt", "b.pt", "c.pt"]


def test_repairs_are_applied_once() -> None:
    loader, copier = checkpoint_utils.load_checkpoint_to_cpu, PathManager.copy
    compat.install()
    assert checkpoint_utils.load_checkpoint_to_cpu is loader and PathManager.copy is copier


def test_configs_reach_other_ranks() -> None:
    """`broadcast_object` saves and loads what a rank sends: a checkpoint's config and dictionary must pass."""
    import io

    from fairseq.distributed import utils as distributed_utils

    sent = {"cfg": OmegaConf.create({"a": 1}), "dictionary": checkpoints.make_dictionary()}
    buffer = io.BytesIO()
    torch.save(sent, buffer)

    def receive() -> Any:
        buffer.seek(0)
        return torch.load(buffer)

    with pytest.raises(pickle.UnpicklingError):
        receive()
    received = repairs._safe_broadcast(receive)()
    assert received["cfg"].a == 1 and received["dictionary"] == sent["dictionary"]
    assert distributed_utils.broadcast_object.__module__ == "s3distill.compat.repairs"


REGISTERED = """
import json, logging
from fairseq import checkpoint_utils
from fairseq.models import MODEL_REGISTRY
from fairseq.registry import REGISTRIES
from fairseq.tasks import TASK_REGISTRY
names = {
    "models": MODEL_REGISTRY, "tasks": TASK_REGISTRY,
    "criterions": REGISTRIES["criterion"]["registry"], "optimizers": REGISTRIES["optimizer"]["registry"],
}
print(json.dumps({
    **{kind: [n for n, c in held.items() if c.__module__.startswith("s3distill.")] for kind, held in names.items()},
    "level": logging.getLogger().level,
    "safe": checkpoint_utils.load_checkpoint_to_cpu.__module__,
}))
"""
ORDERS = {
    "s3distill_first": "import s3distill",
    "fairseq_first": "import fairseq, fairseq.models, fairseq.tasks, fairseq.criterions; import s3distill",
    "wav2vec_first": "import fairseq.models.wav2vec.wav2vec2_asr; import s3distill",
    "user_dir": "from argparse import Namespace; from fairseq.utils import import_user_module; "
    "import_user_module(Namespace(user_dir={user_dir!r}))",
}


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    """Exit status, output and errors of a fresh interpreter for each order; they run side by side."""
    folder = tmp_path_factory.mktemp("elsewhere")
    running = {}
    for name, order in ORDERS.items():
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "LOGLEVEL")}
        if name != "user_dir":
            environment["PYTHONPATH"] = str(REPOSITORY)
        script = order.format(user_dir=str(REPOSITORY / "s3distill")) + REGISTERED
        running[name] = subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    results = {}
    for name, process in running.items():
        out, errors = process.communicate(timeout=120)
        results[name] = (process.returncode, out, errors)
    return results


@pytest.mark.parametrize("order", ORDERS)
def test_all_names_register_whatever_was_imported_first(order: str, registered: dict) -> None:
    status, out, errors = registered[order]
    assert status == 0, errors
    found = json.loads(out.splitlines()[-1])
    assert "ssl_student" in found["models"]
    assert {"audio_distill", "audio_ctc"} <= set(found["tasks"])
    assert "layer_distill" in found["criterions"]
    assert "adamw_groups" in found["optimizers"]
    assert found["safe"] == "s3distill.compat.repairs"
    assert found["level"] != 10, "the root logger was left at DEBUG"


WITHOUT_FAIRSEQ = """
import sys
blocked = {"fairseq", "omegaconf", "hydra"}
class Absent:
    def __init__(self, finder): self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in blocked else self.finder.find_spec(name, path, target)
    def __getattr__(self, name): return getattr(self.finder, name)
sys.meta_path[:] = [Absent(finder) for finder in sys.meta_path]
import torch
torch.set_num_threads(1)
import s3distill
results = []
for path in sys.argv[2:]:
    model = s3distill.load(path)
    out = model(torch.linspace(-1, 1, 4000)[None].sin())
    results.append((out.x, out.logits, model.symbols))
assert not blocked & {name.split(".")[0] for name in sys.modules}
torch.save(results, sys.argv[1])
"""


def test_loading_needs_no_fairseq(tmp_path: Path) -> None:
    paths = []
    for i, (style, as_zip) in enumerate((("dict", True), ("dictconfig", True), ("args", True), ("dictconfig", False))):
        for kind, maker in MAKERS.items():
            written = STYLES[style](maker("wav2vec2", normalize=True)[0])
            paths.append(checkpoints.save(written, tmp_path / f"{kind}{i}.pt", as_zip))
    result = tmp_path / "results.pt"
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_FAIRSEQ, str(result), *map(str, paths)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    with torch.no_grad():
        for path, (x, logits, symbols) in zip(paths, torch.load(result), strict=True):
            model = s3distill.load(path)
            out = model(torch.linspace(-1, 1, 4000)[None].sin())
            torch.testing.assert_close(x, out.x)
            assert symbols == model.symbols
            if logits is not None:
                torch.testing.assert_close(logits, out.logits)
            assert (logits is None) == (path.name.startswith("pretrained"))
