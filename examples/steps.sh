# Sourced by the examples' scripts: run each step once, in the root of the repository, and show its command.
# Needs OUT, the folder of everything. A step that is done is marked in OUT/done and skipped the next time.

# step NAME COMMAND...
step() {
    local name=$1 done_mark="$OUT/done/$1"
    shift
    echo "[$name] $*"
    if [[ -e $done_mark ]]; then
        echo "[$name] done before"
        return
    fi
    "$@"
    mkdir -p "$(dirname "$done_mark")"
    touch "$done_mark"
}

# last RUN: what a training leaves behind
last() { echo "$OUT/$1/checkpoints/checkpoint_last.pt"; }
