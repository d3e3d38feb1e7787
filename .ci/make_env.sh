#!/usr/bin/env bash
# Makes .venv with the versions of constraints.txt, or brings it up to date. Called by every target of the Makefile.
#
#   PYTHON=python3.12  the interpreter to make it with (default python3)
#   PIP_ARGS="..."     more options for every pip install, e.g. an index with CPU builds of torch
#   CXX=clang++        the C++ compiler for fairseq's extensions
#
# s3distill itself goes in as an editable install: `make test` then tests the working tree, and since make runs at the
# root of the repository `common.user_dir=s3distill` means the very same folder, which fairseq insists on ("not globally
# unique" otherwise). From another folder use common.user_dir="$(s3distill path)", or install it with `pip install .`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON="${PYTHON:-python3}"
VENV_PYTHON=.venv/bin/python
STAMP=.venv/s3distill-ready     # written last: what the environment was made from
BUILDING=.venv/s3distill-making # there while it is being made: holds the process id
EXTRAS=train,demo,plots,decode,test-hf,dev

say() { echo "[env] $*"; }
fail() {
    local line
    for line in "$@"; do echo "[env] error: $line" >&2; done
    exit 1
}

check_python() {
    command -v "$PYTHON" >/dev/null 2>&1 ||
        fail "there is no command '$PYTHON'; install Python 3.11 or newer, or name one: make ... PYTHON=python3.11"
    local version
    version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])') ||
        fail "'$PYTHON' does not run; name a working Python: make ... PYTHON=python3.11"
    case "$version" in
    [3-9].*) ;;
    *) fail "Python must be 3.11 or newer, but '$PYTHON' is $version; name another: make ... PYTHON=python3.11" ;;
    esac
    if [ "${version%%.*}" = 3 ] && [ "${version#*.}" -lt 11 ]; then
        fail "Python must be 3.11 or newer, but '$PYTHON' is $version; name another: make ... PYTHON=python3.11"
    fi
    PYTHON_VERSION=$version
}

# One line per thing that the environment depends on; the place counts, because scripts in .venv hold its full path.
wanted_stamp() {
    "$PYTHON" - "$PYTHON_VERSION" "$EXTRAS" "$PIP_ARGS" <<'PY'
import hashlib, os, sys
version, extras, pip_args = sys.argv[1:]
print("python", version)
print("place", os.getcwd())
print("extras", extras)
print("pip", pip_args)
for name in ("constraints.txt", "pyproject.toml", "setup.py", ".ci/make_env.sh"):
    with open(name, "rb") as file:
        print(name, hashlib.sha256(file.read()).hexdigest())
PY
}

check_headers() {
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "'$PYTHON' has no venv module; install it (Debian, Ubuntu: apt install python$PYTHON_VERSION-venv)"
    "$PYTHON" - <<'PY' || fail "the headers of '$PYTHON' (Python.h) are missing, and fairseq's extensions need them;" \
        "install them (Debian, Ubuntu: apt install python$PYTHON_VERSION-dev; Fedora: dnf install python3-devel)"
import os, sys, sysconfig
sys.exit(not os.path.isfile(os.path.join(sysconfig.get_path("include"), "Python.h")))
PY
}

check_compiler() {
    local candidate scratch
    for candidate in c++ g++ clang++; do
        [ -n "${CXX:-}" ] || ! command -v "$candidate" >/dev/null 2>&1 || CXX=$candidate
    done
    CXX=${CXX:-}
    command -v "${CXX%% *}" >/dev/null 2>&1 ||
        fail "there is no C++ compiler (${CXX:-c++, g++ or clang++}), and fairseq's extensions need one; install it" \
            "(Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install) or set CXX=..."
    scratch=$(mktemp -d)
    printf '#include <vector>\nint main() { return static_cast<int>(std::vector<int>{}.size()); }\n' >"$scratch/probe.cpp"
    # shellcheck disable=SC2086  # CXX may hold a launcher: "ccache g++"
    if ! $CXX "$scratch/probe.cpp" -o "$scratch/probe" 2>"$scratch/messages"; then
        sed 's/^/[env]   /' "$scratch/messages" >&2
        rm -rf "$scratch"
        fail "the C++ compiler '$CXX' cannot build a program (its message is above); repair it, or name another with CXX=..."
    fi
    rm -rf "$scratch"
    export CXX
}

# An environment of another Python or place, or one whose making was cut off, is made anew; any other is brought up to date.
must_make_anew() {
    [ -x "$VENV_PYTHON" ] || return 0
    [ ! -e "$BUILDING" ] || { say ".venv was left unfinished: making it anew"; return 0; }
    local found
    found=$("$VENV_PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || found="none that runs"
    [ "$found" = "$PYTHON_VERSION" ] || { say ".venv has Python $found, not $PYTHON_VERSION: making it anew"; return 0; }
    "$VENV_PYTHON" -m pip --version >/dev/null 2>&1 || { say ".venv has no working pip: making it anew"; return 0; }
    if [ -e "$STAMP" ] && ! grep -qxF "place $PWD" "$STAMP"; then
        say ".venv was made in another folder: making it anew"
        return 0
    fi
    return 1
}

is_editable() { # a `pip install .` in between would have make test the copy
    "$VENV_PYTHON" -P -c 'import os, sys, importlib.util as u
sys.exit(not os.path.samefile(u.find_spec("s3distill").origin, "s3distill/__init__.py"))' 2>/dev/null
}

pip_install() {
    local quiet=(--quiet)
    [ ! -t 1 ] || quiet=()
    # shellcheck disable=SC2086  # PIP_ARGS is a list of options
    "$VENV_PYTHON" -m pip install --disable-pip-version-check "${quiet[@]+"${quiet[@]}"}" -c constraints.txt $PIP_ARGS "$@"
}

# pip calls an index that it cannot reach a conflict of versions, so a package of a few kilobytes is asked for to tell which.
index_is_reached() {
    local scratch reached=0
    scratch=$(mktemp -d)
    # shellcheck disable=SC2086
    "$VENV_PYTHON" -m pip download --disable-pip-version-check --quiet --no-deps --no-cache-dir $PIP_ARGS \
        --dest "$scratch" iniconfig >/dev/null 2>&1 || reached=1
    rm -rf "$scratch"
    return $reached
}

install() { # install STEP WHAT pip-arguments...
    local step=$1 what=$2
    shift 2
    say "$step $what"
    pip_install "$@" && return
    index_is_reached ||
        fail "could not install $what: pip reaches no package index. Check the network, a proxy (HTTPS_PROXY) and pip's" \
            "settings (pip config list; PIP_NO_INDEX must not be set), then run the command again."
    fail "could not install $what; pip's own message is above. A compiler's error there: name another with CXX=... (now $CXX)." \
        "A full disk: torch and its CUDA libraries take up to 8 GB. Then run the command again."
}

PIP_ARGS="${PIP_ARGS:-}"
check_python
WANTED=$(wanted_stamp)
if [ -x "$VENV_PYTHON" ] && [ ! -e "$BUILDING" ] && [ "$(cat "$STAMP" 2>/dev/null)" = "$WANTED" ] && is_editable; then
    exit 0
fi

if [ -e "$BUILDING" ] && kill -0 "$(cat "$BUILDING")" 2>/dev/null; then
    fail "another make (process $(cat "$BUILDING")) is making .venv; wait for it" \
        "(if there is none, remove $BUILDING and run the command again)"
fi
check_headers
check_compiler
say "Python $PYTHON_VERSION ($(command -v "$PYTHON")), C++ compiler $CXX; making .venv takes a few minutes and is done once"
if must_make_anew; then
    rm -rf .venv
    mkdir .venv
    echo $$ >"$BUILDING"
    say "1/4 an empty environment in .venv"
    "$PYTHON" -m venv .venv || fail "'$PYTHON -m venv .venv' failed; its message is above (disk full? no write access?)"
else
    say "1/4 .venv is there: bringing it up to date"
fi
rm -f "$STAMP"
echo $$ >"$BUILDING"

install 2/4 "torch and what fairseq is built with" torch setuptools wheel cython numpy ninja editdistance
# Without build isolation: pip would fetch a second torch just for building.
install 3/4 "fairseq (built here, about 2 minutes)" --no-build-isolation fairseq-fixed hydra-core omegaconf
install 4/4 "s3distill and the rest" --no-build-isolation --editable ".[$EXTRAS]"
"$VENV_PYTHON" -c 'import torch, fairseq, soundfile' ||
    fail "the environment is there, but torch, fairseq or soundfile does not load (message above); make clean and try again"
printf '%s\n' "$WANTED" >"$STAMP.new"
mv "$STAMP.new" "$STAMP"
rm -f "$BUILDING"
say "ready: .venv"
