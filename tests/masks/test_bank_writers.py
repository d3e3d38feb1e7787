"""Several processes write one bank: whatever was acknowledged is there in the end."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from s3distill.masks import bank_file
from s3distill.masks.bank import MaskBank
from tests.masks.banks import NUM_PARAMETERS, make_entry

ROOT = Path(__file__).parents[2]
CHECKSUM = "ab" * 32
ROUNDS, ENTRIES = 8, 5

# Adds entries until all of its own are acknowledged, to one bank after another, and prints what was refused on the way.
# Both processes start each round together, so that they make the bank at the same time, too, and are slow where it counts.
_WRITER = """
import itertools, os, sys, time
from pathlib import Path
from s3distill.masks.bank import MaskBank
from tests.masks.banks import NUM_PARAMETERS, make_entry

def slowly(function):
    return lambda *paths: (time.sleep(0.005), function(*paths))

os.replace, os.link = slowly(os.replace), slowly(os.link)
folder, mine, rounds, number = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
entry = make_entry("x")
for r in range(rounds):
    (folder / f"{r}.{mine}").touch()
    while len(list(folder.glob(f"{r}.[01]"))) < 2:
        time.sleep(0)
    path, refused = folder / f"{r}.bank", 0
    for i in range(number):
        own = type(entry)(f"{mine}-{i}", entry.masks, entry.tensors, entry.symbols, entry.info)
        while True:
            try:
                if path.exists():
                    MaskBank.open(path).add(own)
                else:
                    MaskBank.create(path, "ab" * 32, NUM_PARAMETERS, [own])
                break
            except (RuntimeError, ValueError) as error:
                if "just changed it" not in str(error) and "must not be there yet" not in str(error):
                    raise
                refused += 1
    print(refused, flush=True)
"""


def start_writer(folder: Path, name: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", _WRITER, str(folder), name, str(ROUNDS), str(ENTRIES)]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.skipif(bank_file.fcntl is None, reason="this system has no flock")
def test_two_writers_lose_nothing(tmp_path: Path) -> None:
    writers = [start_writer(tmp_path, name) for name in "01"]
    outputs = [writer.communicate(timeout=300) for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], outputs
    for r in range(ROUNDS):
        bank = MaskBank.open(tmp_path / f"{r}.bank")
        assert sorted(bank.names) == [f"{writer}-{i}" for writer in "01" for i in range(ENTRIES)]
        assert list(bank.damaged_entries()) == []
    refused = sum(int(line) for out, _ in outputs for line in out.split())
    assert refused > 0, "they never met, so nothing was shown"
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob("*lock*"))


def test_a_writer_waits_for_the_one_before_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The second has read the same state; it must find out that it changed, not replace it."""
    fcntl = pytest.importorskip("fcntl")
    bank = MaskBank.create(tmp_path / "bank", CHECKSUM, NUM_PARAMETERS, [make_entry("nl")])
    code = (
        "import sys; from s3distill.masks.bank import MaskBank; from tests.masks.banks import make_entry; "
        "bank = MaskBank.open(sys.argv[1]); print('opened', flush=True); sys.stdin.readline(); bank.add(make_entry('fr'))"
    )
    words = [sys.executable, "-c", code, str(bank.path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, cwd=ROOT, text=True, **pipes) as second, bank.path.open("rb") as file:
        assert second.stdout is not None and second.stdin is not None
        assert second.stdout.readline() == "opened\n"
        fcntl.flock(file, fcntl.LOCK_EX)
        second.stdin.write("\n")
        second.stdin.flush()
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(0.5)
        other = tmp_path / "other"
        MaskBank.create(other, CHECKSUM, NUM_PARAMETERS, [make_entry("de")])
        os.replace(other, bank.path)
        fcntl.flock(file, fcntl.LOCK_UN)
        _, errors = second.communicate(timeout=60)
    assert second.returncode == 1 and "another process has just changed it; nothing was written" in errors
    assert MaskBank.open(bank.path).names == ["de"] and os.listdir(tmp_path) == ["bank"]


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP])
def test_a_file_system_without_hard_links(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def link(*_: object) -> None:
        raise OSError(code, "not here")

    monkeypatch.setattr(bank_file.os, "link", link)
    with caplog.at_level(logging.WARNING):
        bank = MaskBank.create(tmp_path / "bank", CHECKSUM, NUM_PARAMETERS, [make_entry("nl")])
    assert bank.names == ["nl"] and os.listdir(tmp_path) == ["bank"]
    assert "has no hard links" in caplog.text


def test_a_link_that_fails_otherwise_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(bank_file.os, "link", link)
    with pytest.raises(OSError, match="broken disk"):
        MaskBank.create(tmp_path / "bank", CHECKSUM, NUM_PARAMETERS, [make_entry("nl")])
    assert os.listdir(tmp_path) == []


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fcntl = pytest.importorskip("fcntl")
    bank = MaskBank.create(tmp_path / "bank", CHECKSUM, NUM_PARAMETERS, [make_entry("nl")])

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with caplog.at_level(logging.WARNING):
        bank.add(make_entry("fr"))
    assert bank.names == ["nl", "fr"] and "cannot be locked" in caplog.text


def test_a_system_without_fcntl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank_file, "fcntl", None)
    bank = MaskBank.create(tmp_path / "bank", CHECKSUM, NUM_PARAMETERS, [make_entry("nl")])
    other = MaskBank.open(bank.path)
    bank.add(make_entry("fr"))
    with pytest.raises(RuntimeError, match="another process has just changed it"):
        other.add(make_entry("de"))
    assert MaskBank.open(bank.path).names == ["nl", "fr"]
