#!/usr/bin/env bash
# ruff and mypy, all three even when the first one fails. Called by `make lint`, from the root of the repository.
set -u

status=0
for check in "ruff check" "ruff format --check" "mypy"; do
    echo "== $check"
    # shellcheck disable=SC2086  # the words of a check are its arguments
    .venv/bin/python -m $check || status=1
done
exit $status
