"""What the end-to-end tests share: the real commands as fast child processes, a small corpus, a small teacher."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from s3distill import compat
from s3distill.data.manifest import write_manifest
from s3distill.encoder.checkpoint import config_from_options
from s3distill.encoder.config import SAMPLE_RATE
from s3distill.encoder.model import SpeechEncoder

pytest.importorskip("fairseq")

ROOT = Path(__file__).parents[2]

# a wav2vec 2.0 of 38,000 parameters
TEACHER_OPTIONS = {
    "_name": "wav2vec2",
    "extractor_mode": "default",
    "conv_feature_layers": "[(16, 10, 5)] + [(16, 3, 2)] * 4 + [(16, 2, 2)] * 2",
    "conv_bias": False,
    "encoder_layers": 3,
    "encoder_embed_dim": 32,
    "encoder_ffn_embed_dim": 64,
    "encoder_attention_heads": 4,
    "activation_fn": "gelu",
    "layer_norm_first": True,
    "conv_pos": 16,
    "conv_pos_groups": 4,
}


@dataclass
class Command:
    """A command that was started; `wait` gives its result."""

    server: Server
    pid: int
    log: Path
    status: int | None = None

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self) -> Command:
        if self.status is None:
            self.status = self.server.ask({"wait": self.pid})["status"]
        return self

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 250) -> None:
        """Waits until something has happened while the command runs."""
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, f"timed out; the end of the log:\n{self.output[-3000:]}"
            time.sleep(0.005)

    def kill(self) -> None:
        """SIGKILL: no handler runs, nothing is flushed."""
        os.killpg(self.pid, signal.SIGKILL)
        self.wait()
        assert self.status == -signal.SIGKILL, f"the command was over before it was killed:\n{self.output[-3000:]}"

    def succeeded(self) -> Command:
        self.wait()
        assert self.status == 0, f"exit status {self.status}; the end of the log:\n{self.output[-5000:]}"
        return self


class Server:
    """See `fork_server.py`."""

    def __init__(self, logs: Path) -> None:
        self.logs, self.count = logs, 0
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )

    def ask(self, request: dict) -> dict:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, *argv: object) -> Command:
        self.count += 1
        log = self.logs / f"{self.count:03d}.log"
        log.touch()
        answer = self.ask({"start": [str(word) for word in argv], "log": str(log)})
        return Command(self, answer["pid"], log)

    def run(self, *argv: object) -> Command:
        return self.start(*argv).wait()


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Runs the real commands from the root of the repository."""
    server = Server(tmp_path_factory.mktemp("logs"))
    yield server
    server.process.kill()  # every command was waited for, so it has no children left
    server.process.wait()


def write_corpus(folder: Path, num_train: int = 24, num_valid: int = 4, seed: int = 1) -> Path:
    """Tones with noise, 0.4 to 1.4 s, with letters and a dictionary: no speech, but enough to train on."""
    rng = np.random.default_rng(seed)
    for split, number in (("train", num_train), ("valid", num_valid)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        entries = []
        for i in range(number):
            num_samples = int(rng.integers(int(0.4 * SAMPLE_RATE), int(1.4 * SAMPLE_RATE)))
            time_s = np.arange(num_samples) / SAMPLE_RATE
            tones = sum(np.sin(2 * np.pi * rng.uniform(100, 3000) * time_s) for _ in range(4))
            noise = rng.standard_normal(num_samples)
            name = f"{split}/{i:03d}.flac"
            soundfile.write(folder / name, 0.1 * tones + 0.05 * noise, SAMPLE_RATE, subtype="PCM_16")
            entries.append((name, num_samples))
        write_manifest(folder / f"{split}.tsv", ".", entries)
        (folder / f"{split}.ltr").write_text("A B |\n" * number)
        (folder / f"{split}.wrd").write_text("AB\n" * number)
    (folder / "dict.ltr.txt").write_text("A 24\nB 24\n| 24\n")
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with manifests of 24 + 4 utterances; read only."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def write_teacher(path: Path, seed: int = 1, normalize: bool = True, **options: object) -> Path:
    """A teacher with random weights."""
    torch.manual_seed(seed)
    options = {**TEACHER_OPTIONS, **options}
    encoder = SpeechEncoder(config_from_options(options, "wav2vec2"))
    compat.write_checkpoint(path, encoder.state_dict(), options, {"_name": "audio_pretraining", "normalize": normalize})
    return path


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher's checkpoint; read only."""
    return write_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pt")


def stage1_command(corpus: Path, teacher: Path, out: Path, *overrides: str, max_update: int = 20) -> list[str]:
    """Stage 1 of config/quickstart at a small shape; later overrides win."""
    options = {
        "common.user_dir": "s3distill",
        "common.log_interval": "1",
        "hydra.run.dir": str(out),
        "task.data": str(corpus),
        "task.teacher_path": str(teacher),
        "model.student_path": str(teacher),
        "model.distill_layers": "'0,1,3'",
        "dataset.batch_size": "4",
        "dataset.validate_interval_updates": "0",
        "optimization.max_update": str(max_update),
        "lr_scheduler.warmup_updates": "3",
        "criterion.sparsity_warmup": "5",
        "criterion.target_sparsity": "0.3",
        "checkpoint.save_interval_updates": "5",
    }
    options |= dict(override.split("=", 1) for override in overrides)
    command = ["fairseq-hydra-train", "--config-dir", "config/quickstart", "--config-name", "stage1"]
    return [*command, *(f"{key}={value}" for key, value in options.items())]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Kit:
    """The helpers above, for test modules (which cannot import each other)."""

    commands: Server
    corpus: Path
    teacher: Path

    write_corpus = staticmethod(write_corpus)
    write_teacher = staticmethod(write_teacher)

    @staticmethod
    def last_checkpoint(out: Path) -> Path:
        """What a run leaves behind."""
        return out / "checkpoints" / "checkpoint_last.pt"

    def start_ranks(self, command: list[str], world_size: int = 2) -> list[Command]:
        """Starts a training once per rank, as a user without a GPU has to (DESIGN, facts)."""
        port = free_port()
        rank_options = [
            f"distributed_training.distributed_world_size={world_size}",
            f"distributed_training.distributed_init_method=tcp://127.0.0.1:{port}",
            "distributed_training.distributed_no_spawn=true",
            "distributed_training.distributed_backend=gloo",
            "distributed_training.ddp_backend=legacy_ddp",
        ]
        return [
            self.commands.start(*command, *rank_options, f"distributed_training.distributed_rank={rank}")
            for rank in range(world_size)
        ]

    def stage1_command(self, out: Path, *overrides: str, max_update: int = 20) -> list[str]:
        return stage1_command(self.corpus, self.teacher, out, *overrides, max_update=max_update)

    def start_stage1(self, out: Path, *overrides: str, max_update: int = 20) -> Command:
        return self.commands.start(*self.stage1_command(out, *overrides, max_update=max_update))

    def stage1(self, out: Path, *overrides: str, max_update: int = 20) -> Command:
        return self.start_stage1(out, *overrides, max_update=max_update).wait()


@pytest.fixture(scope="session")
def kit(commands: Server, corpus: Path, teacher: Path) -> Kit:
    return Kit(commands, corpus, teacher)
