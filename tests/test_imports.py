"""The architecture: imports point down (cli -> shell -> core -> torch; tools use the core), and a file's name is its registered name.

Only the source is read, nothing is imported, so that a forbidden import inside a function is found too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "s3distill"

LAYERS = {
    "core": (
        "encoder",
        "gates",
        "masks",
        "heads",
        "losses",
        "pruning",
        "decoding",
        "kernels",
        "products",
        "convolutions",
    ),
    "tools": ("data", "analysis", "export"),
    "shell": ("models", "tasks", "criterions", "optim", "scoring"),
    "cli": ("cli",),
    "compat": ("compat",),
    "root": ("",),  # s3distill/__init__.py, which registers the shells
}
MAY_IMPORT = {
    "core": {"core"},
    "tools": {"core", "tools", "compat"},
    "shell": {"core", "tools", "compat", "shell"},
    "cli": {"core", "tools", "compat", "shell", "root", "cli"},
    "compat": {"compat"},
    "root": {"core", "compat"},
}
FAIRSEQ = ("fairseq", "fairseq_cli", "hydra", "omegaconf")
MAY_IMPORT_FAIRSEQ = ("shell", "cli", "compat")
FORBIDDEN_PARAMETERS = (
    "cfg",
    "args",
    "sample",
)  # fairseq's containers; the core takes tensors, numbers and its own dataclasses

ROOMS = ("models", "tasks", "criterions", "optim", "scoring")  # the shells
REGISTER = (
    "register_model",
    "register_task",
    "register_criterion",
    "register_optimizer",
    "register_lr_scheduler",
    "register_scorer",
)


def layer_of(module: str) -> str:
    """Layer of a dotted module inside the package, ``""`` being the package itself; KeyError for a folder that has none."""
    return {room: layer for layer, rooms in LAYERS.items() for room in rooms}[module.split(".")[0]]


def modules(package: Path) -> Iterator[tuple[str, Path]]:
    """Dotted name inside the package -> file."""
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), file


def imported(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything that a module imports, wherever in it; the package is called ``s3distill``."""
    inside = ["s3distill", *(module.split(".") if module else [])]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) - node.level + is_package] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{name}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and _name(node.func) in ("import_module", "__import__"):
            literals = (value for value in node.args[:1] if isinstance(value, ast.Constant))
            yield from ((node.lineno, str(value.value)) for value in literals)


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def import_faults(package: Path) -> list[str]:
    """Every arrow that points up, as ``file:line: rule``."""
    rooms = {module.split(".")[0] for module, _ in modules(package)}
    faults = []
    for module, file in modules(package):
        layer = layer_of(module)
        tree = ast.parse(file.read_text())
        for line, name in imported(tree, module, file.name == "__init__.py"):
            where = f"{file.relative_to(package)}:{line}"
            top, _, rest = name.partition(".")
            if top == "s3distill":
                room = rest.split(".")[0]
                target = layer_of(room if room in rooms else "")
                if target not in MAY_IMPORT[layer] and rest != "__version__":
                    faults.append(f"{where}: {layer} must not import {target} ({name})")
            elif top in FAIRSEQ and layer not in MAY_IMPORT_FAIRSEQ:
                faults.append(f"{where}: {layer} must not import {top} ({name})")
    return faults


def parameter_faults(package: Path) -> list[str]:
    """Functions of the core that take fairseq's containers, as ``file:line: rule``."""
    faults = []
    for module, file in modules(package):
        if layer_of(module) != "core":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                taken = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                faults += [
                    f"{file.relative_to(package)}:{p.lineno}: core takes no `{p.arg}`"
                    for p in taken
                    if p.arg in FORBIDDEN_PARAMETERS
                ]
    return faults


def registered_names(file: Path) -> list[str]:
    """The names that a file registers with a decorator; a name that is no literal is shown as its source."""
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        for decorator in getattr(node, "decorator_list", []):
            if isinstance(decorator, ast.Call) and _name(decorator.func) in REGISTER:
                named = [*decorator.args[:1], *(k.value for k in decorator.keywords if k.arg == "name")]
                names += [str(n.value) if isinstance(n, ast.Constant) else ast.unparse(n) for n in named[:1]]
    return names


def name_faults(package: Path) -> list[str]:
    """Shell files that do not register exactly their own name; helpers live in files that start with an underscore."""
    faults = []
    for room in ROOMS:
        for file in sorted((package / room).glob("*.py")):
            expected = [] if file.stem.startswith("_") else [file.stem]
            found = registered_names(file)
            if found != expected:
                faults.append(f"{room}/{file.name}: must register {expected}, but registers {found}")
        faults += [f"{room}/{folder.name}: shells have no folders" for folder in (package / room).glob("[!_]*/")]
    return faults


def test_no_import_points_up():
    assert import_faults(PACKAGE) == []


def test_the_core_takes_no_container_of_fairseq():
    assert parameter_faults(PACKAGE) == []


def test_file_names_are_registered_names():
    assert name_faults(PACKAGE) == []


def test_every_folder_is_an_installed_package():
    """A folder without ``__init__.py`` would be missing in a normal install, and with it from common.user_dir=s3distill."""
    assert [str(f.parent) for f in PACKAGE.rglob("*.py") if not (f.parent / "__init__.py").is_file()] == []


def test_the_walk_sees_the_package():
    found = {module for module, _ in modules(PACKAGE)}
    assert {"", "compat", "kernels", "encoder", "encoder.model", "cli.main"} <= found
    assert LAYERS["shell"] == ROOMS


def _write(package: Path, path: str, source: str) -> None:
    file = package / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source)


@pytest.fixture
def fake(tmp_path):
    """A package without faults."""
    for path in ("__init__.py", "compat.py", "encoder/__init__.py", "data/audio.py", "models/_parts.py", "cli/main.py"):
        _write(tmp_path, path, "")
    _write(tmp_path, "kernels.py", "import torch\n")
    _write(tmp_path, "models/student.py", "@register_model('student', dataclass=C)\nclass S: ...\n")
    return tmp_path


def test_a_package_without_faults_passes(fake):
    _write(fake, "encoder/model.py", "from s3distill import kernels\nfrom . import layers\ndef f(*args, x=1): ...\n")
    _write(fake, "encoder/layers.py", "from ..kernels import layer_norm\n")
    _write(
        fake,
        "models/_parts.py",
        "import fairseq\nfrom s3distill import compat\nfrom s3distill.encoder.model import f\n",
    )
    _write(fake, "data/audio.py", "import soundfile\nfrom s3distill.encoder import model\n")
    _write(fake, "cli/main.py", "import s3distill\nfrom s3distill.models import student\n")
    assert import_faults(fake) + parameter_faults(fake) + name_faults(fake) == []


@pytest.mark.parametrize(
    ("path", "source", "fault"),
    [
        ("encoder/bad.py", "import fairseq", "encoder/bad.py:1: core must not import fairseq (fairseq)"),
        ("encoder/bad.py", "\nfrom hydra.core import x", "encoder/bad.py:2: core must not import hydra (hydra.core.x)"),
        (
            "gates/bad.py",
            "def f():\n    from omegaconf import II",
            "gates/bad.py:2: core must not import omegaconf (omegaconf.II)",
        ),
        (
            "encoder/bad.py",
            "import importlib as i\ni.import_module('fairseq.data')",
            "core must not import fairseq (fairseq.data)",
        ),
        ("kernels.py", "from s3distill import compat", "core must not import compat (s3distill.compat)"),
        ("encoder/bad.py", "from s3distill import load", "core must not import root (s3distill.load)"),
        ("encoder/bad.py", "from .. import compat", "core must not import compat (s3distill.compat)"),
        ("encoder/__init__.py", "from ..data import audio", "core must not import tools (s3distill.data.audio)"),
        ("encoder/bad.py", "import s3distill.models.student", "core must not import shell (s3distill.models.student)"),
        (
            "data/bad.py",
            "from s3distill.models._parts import x",
            "tools must not import shell (s3distill.models._parts.x)",
        ),
        ("data/bad.py", "import fairseq.data", "tools must not import fairseq (fairseq.data)"),
        (
            "models/_parts.py",
            "from s3distill.cli.main import main",
            "shell must not import cli (s3distill.cli.main.main)",
        ),
        ("compat.py", "from s3distill.encoder import x", "compat must not import core (s3distill.encoder.x)"),
    ],
)
def test_an_arrow_that_points_up_is_found(fake, path, source, fault):
    _write(fake, path, source)
    faults = import_faults(fake)
    assert len(faults) == 1
    assert faults[0].endswith(fault)


def test_a_folder_without_a_layer_is_refused(fake):
    _write(fake, "helpers/things.py", "")
    with pytest.raises(KeyError, match="helpers"):
        import_faults(fake)


@pytest.mark.parametrize(
    "source", ["def f(cfg): ...", "class A:\n    def g(self, *, args): ...", "h = lambda sample: 1"]
)
def test_a_container_of_fairseq_in_the_core_is_found(fake, source):
    _write(fake, "losses/bad.py", source)
    assert len(parameter_faults(fake)) == 1
    _write(fake, "losses/bad.py", "")
    _write(fake, "models/_parts.py", source)
    assert parameter_faults(fake) == []


@pytest.mark.parametrize(
    ("path", "source", "found"),
    [
        ("models/student.py", "@register_model('teacher')\nclass S: ...", "['teacher']"),
        ("models/student.py", "def helper(): ...", "[]"),
        (
            "models/student.py",
            "@register_model('student')\nclass S: ...\n@register_model('b')\nclass T: ...",
            "['student', 'b']",
        ),
        ("models/student.py", "@register_model(NAME)\nclass S: ...", "['NAME']"),
        ("optim/_parts.py", "@fairseq.optim.register_optimizer(name='_parts')\nclass S: ...", "['_parts']"),
    ],
)
def test_a_file_that_registers_another_name_is_found(fake, path, source, found):
    _write(fake, path, source)
    faults = name_faults(fake)
    assert len(faults) == 1
    assert faults[0].startswith(path)
    assert faults[0].endswith(f"but registers {found}")
