#!/usr/bin/env bash
# Pruning of a fine-tuned model: S3-Router against OMP, IMP and PARP with the same number of updates. See README.md beside this file.
# Run it again after an interruption: finished steps are skipped, and a training goes on from its last checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=examples/steps.sh
source examples/steps.sh

if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    cat >&2 <<'USAGE'
usage: [OPTION=...] examples/s3_router/pruning.sh
options, with their defaults:
  METHODS="s3_router omp imp parp"
  SPARSITIES="50 70 80"           percent of each masked matrix that are removed
  UPDATES=200                     of each pruning run
  DATA=                           your own manifests (train, test, .ltr, .wrd, dict.ltr.txt); empty: demo speech
  DENSE=                          your own model, fine-tuned with CTC; empty: a small one is trained on DATA
  TEST=test                       split to decode
  JOBS=2                          runs at a time, each with OMP_NUM_THREADS=1 threads
  OUT=outputs/s3_router_pruning   folder of everything
  ARGS, DENSE_ARGS, S3_ROUTER_ARGS, OMP_ARGS, IMP_ARGS, PARP_ARGS   more overrides: of every pruning run, or of one kind
  DATA_ARGS, DECODE_ARGS          more options of demo-data and of fairseq-generate
USAGE
    exit 2
fi
export METHODS=${METHODS:-s3_router omp imp parp} SPARSITIES=${SPARSITIES:-50 70 80} UPDATES=${UPDATES:-200} TEST=${TEST:-test}
export OUT=${OUT:-outputs/s3_router_pruning} JOBS=${JOBS:-2} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
for sparsity in $SPARSITIES; do
    [[ $sparsity =~ ^[1-9][0-9]?$ ]] || { echo "SPARSITIES must be whole percents from 1 to 99, but has $sparsity" >&2; exit 2; }
done
mkdir -p "$OUT/logs"
log=
trap '(($? == 0)) || [[ ! -s $log ]] || { tail -n 20 "$log"; echo "failed; all of its output is in $log"; } >&2' EXIT

# logged NAME COMMAND...: a step whose output goes to a file of its own, since several run at a time
logged() {
    if [[ -e $OUT/done/$1 ]]; then
        echo "[$1] done before"
        return
    fi
    echo "[$1] ${*:2}"
    log=$OUT/logs/$1.log
    step "$@" >>"$log" 2>&1
}

# The ARGS are lists of words: they are split on purpose.
# shellcheck disable=SC2086
{
    decode() { # NAME CHECKPOINT
        logged "decode_$1" fairseq-generate "$DATA" --user-dir s3distill --task audio_ctc --labels ltr --gen-subset "$TEST" \
            --batch-size 16 --path "$2" --post-process letter --scoring s3_wer --results-path "$OUT/decode/$1" ${DECODE_ARGS:-}
    }
    tune() { # NAME OVERRIDES...: from the dense model, then decode
        local name=$1
        shift
        logged "$name" fairseq-hydra-train --config-dir config/s3_router --config-name pruning_demo common.user_dir=s3distill \
            "task.data=$DATA" "model.w2v_path=$DENSE" "checkpoint.finetune_from_model=$DENSE" "hydra.run.dir=$OUT/$name" \
            "optimization.max_update=$UPDATES" dataset.disable_validation=true "$@" ${ARGS:-}
        decode "$name" "$(last "$name")"
    }
    one_run() { # METHOD [SPARSITY]
        local method=$1 sparsity=${2:-0} run
        local pruned=("model.prune_method=$method" "model.prune_rate=$(printf '0.%02d' $((100 - sparsity)))") # the rate is what stays
        run=${method}_$sparsity
        case $method in
        dense) decode dense "$DENSE" ;;
        # the same updates without pruning: what of a difference comes from training longer
        dense_longer) tune dense_longer model.prune_rate=1 model.co_train=true ;;
        # the scores start as the weights, and Adam moves both by the learning rate: so one rate suits all
        s3_router) tune "$run" "${pruned[@]}" ${S3_ROUTER_ARGS:-} ;;
        omp) tune "$run" "${pruned[@]}" ${OMP_ARGS:-} ;;
        # five steps within the first 40% of the updates
        imp) tune "$run" "${pruned[@]}" model.prune_steps=5 "model.prune_interval=$((UPDATES / 10))" ${IMP_ARGS:-} ;;
        parp) tune "$run" "${pruned[@]}" "model.prune_interval=$((UPDATES / 4))" ${PARP_ARGS:-} ;;
        *) echo "METHODS must be of s3_router, omp, imp and parp, but has $method" >&2 && return 2 ;;
        esac
    }

    if [[ "${1:-}" == --run ]]; then # this script calls itself, JOBS times at once
        one_run "${@:2}"
        exit
    fi
    if [[ -z "${DATA:-}" ]]; then
        DATA=$OUT/data
        logged data s3distill demo-data "$DATA" --minutes 20 --valid-minutes 1 --test-minutes 10 --no-progress ${DATA_ARGS:-}
    fi
    if [[ -z "${DENSE:-}" ]]; then
        logged dense fairseq-hydra-train --config-dir config/quickstart --config-name teacher common.user_dir=s3distill \
            "task.data=$DATA" "hydra.run.dir=$OUT/dense" ${DENSE_ARGS:-}
        DENSE=$(last dense)
    fi
    export DATA DENSE
    log= # each run has its own, and shows it where it fails
    {
        printf 'dense\ndense_longer\n'
        for sparsity in $SPARSITIES; do
            for method in $METHODS; do echo "$method $sparsity"; done
        done
    } | xargs -P "$JOBS" -L 1 "$PWD/examples/s3_router/pruning.sh" --run
    python examples/s3_router/pruning_table.py "$OUT" --split "$TEST" --methods $METHODS --sparsities $SPARSITIES
}
