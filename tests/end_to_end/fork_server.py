"""Runs the real commands without paying seconds of imports for each: a process that has imported fairseq, and forks.

A child does what the installed script does in a fresh process: it runs that script with its own ``sys.argv``, output and
exit status. s3distill itself is not imported beforehand, so it arrives through ``common.user_dir`` as for a user.

Requests and answers are lines of JSON: ``{"start": [argv], "log": path}`` -> ``{"pid": n}``, ``{"wait": n}`` ->
``{"status": exit status, negative = signal}``.
"""

import json
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path

import fairseq_cli.generate
import fairseq_cli.hydra_train
import soundfile
import torch

TIMEOUT_S = 300  # a command that takes longer hangs
_PRELOADED = (fairseq_cli.generate, fairseq_cli.hydra_train, soundfile, torch)


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            pid = os.fork()
            if pid == 0:
                _become(request["start"], request["log"])
            answer = {"pid": pid}
        else:
            answer = {"status": os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])}
        print(json.dumps(answer), flush=True)


def _become(argv: list[str], log: str) -> None:
    """Runs a command as this process; does not return."""
    status = 1
    try:
        os.setpgrp()  # so that a kill reaches its own children too
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        signal.alarm(TIMEOUT_S)
        script = Path(sys.executable).parent / argv[0]
        sys.argv = [str(script), *argv[1:]]
        if argv[0] == "s3distill":  # as `python -m`, which needs no installed package
            sys.path[0] = os.getcwd()
            runpy.run_module("s3distill.cli.main", run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(script.parent)
            runpy.run_path(str(script), run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
