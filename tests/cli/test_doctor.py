"""`s3distill doctor` and `s3distill path`: what they find, and what they say when something is missing."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import s3distill
from s3distill import kernels
from s3distill.cli import doctor
from s3distill.cli.main import main

PACKAGE = Path(s3distill.__file__).parent
HAS_FAIRSEQ = importlib.util.find_spec("fairseq") is not None


def _without(monkeypatch, *missing):
    """Makes the modules look as if they were not installed."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in missing else find_spec(name, *rest)
    )


def _fault(findings, name):
    return {fault["name"]: fault for fault in findings["faults"]}[name]


def test_json_holds_all_findings(capsys):
    status = main(["doctor", "--json"])
    findings = json.loads(capsys.readouterr().out)
    assert status == 0
    assert findings["ok"] is True
    assert findings["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert findings["versions"]["torch"].split("+")[0] == importlib.metadata.version("torch").split("+")[0]
    assert findings["devices"]["cpu_cores"] >= 1
    assert [row["name"] for row in findings["kernels"]] == [*(row.name for row in kernels.report()), "product"]
    assert Path(findings["user_dir"]["path"]) == PACKAGE


@pytest.mark.skipif(not HAS_FAIRSEQ, reason="needs fairseq")
def test_every_shell_file_is_registered():
    registered = doctor.examine()["registered"]
    for folder in ("models", "tasks", "criterions", "optim"):
        names = {file.stem for file in (PACKAGE / folder).glob("*.py") if not file.stem.startswith("_")}
        assert names, f"{folder} has no registered name"
        assert registered[folder] == dict.fromkeys(names, True)


@pytest.mark.skipif(not HAS_FAIRSEQ, reason="needs fairseq")
def test_a_name_that_another_package_took_is_an_error(monkeypatch, capsys):
    from fairseq.models import MODEL_REGISTRY, BaseFairseqModel

    monkeypatch.setitem(MODEL_REGISTRY, "ssl_student", BaseFairseqModel)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "ssl_student (MISSING)" in out
    assert "ERROR models/ssl_student: is registered by fairseq.models.fairseq_model instead of s3distill" in out


def test_text_names_versions_devices_and_kernels(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in ("torch", "soundfile", "hydra-core", "omegaconf", "CPU", "GPU", "layer_norm", "adamw", str(PACKAGE)):
        assert word in out


def test_a_missing_extra_is_named_with_its_remedy(monkeypatch, capsys):
    _without(monkeypatch, "espeakng_loader", "matplotlib")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "espeakng_loader: not installed; needed for s3distill demo-data and quickstart" in out
    assert "pip install 's3distill[demo]'" in out
    assert "pip install 's3distill[plots]'" in out
    assert "nothing is missing" not in out


def test_nothing_is_missing_where_all_is_there(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "LIBRARIES", doctor.LIBRARIES[:3])
    assert main(["doctor"]) == 0
    assert "nothing is missing" in capsys.readouterr().out


def test_without_fairseq_it_says_how_to_install_it(monkeypatch):
    _without(monkeypatch, "fairseq")
    findings = doctor.examine()
    assert findings["ok"] is True
    assert findings["registered"] == {}
    assert findings["user_dir"]["resolves_from_any_folder"] is False
    assert "--no-build-isolation 's3distill[train]'" in _fault(findings, "fairseq")["remedy"]


def test_a_broken_soundfile_is_an_error(monkeypatch, capsys):
    import_module = importlib.import_module

    def broken(name, *rest):
        if name == "soundfile":
            raise OSError("sndfile library not found")
        return import_module(name, *rest)

    monkeypatch.setattr(importlib, "import_module", broken)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "ERROR soundfile: does not load: sndfile library not found; needed for reading audio" in out
    assert "pip install --force-reinstall soundfile" in out


def test_without_torch_it_still_reports(monkeypatch):
    _without(monkeypatch, "torch")
    findings = doctor.examine()
    assert findings["ok"] is False
    assert findings["devices"] == {}
    assert "unknown, because torch does not load" in doctor.describe(findings)


def test_torchaudio_is_never_imported(tmp_path):
    (tmp_path / "torchaudio.py").write_text("raise OSError('libcudart.so: cannot open shared object file')")
    code = "import sys; from s3distill.cli.main import main; status = main(['doctor']); print(status, 'torchaudio' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(PACKAGE.parent)])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines()[-1] == "0 False", done.stderr


def test_path_is_absolute_from_any_folder(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-m", "s3distill.cli.main", "path"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True)
    assert done.stdout == f"{PACKAGE}\n"


def test_every_distribution_has_a_remedy_that_installs_it():
    for library in doctor.LIBRARIES:
        assert library.remedy.startswith("pip install "), library
