#!/usr/bin/env bash
# DPHuBERT at several sizes: one sweep of stage 1, then each size to its end, and a report of all of them against the teacher.
# Run it again after an interruption: finished steps are skipped, and a training goes on from its last checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [[ -z "${DATA:-}" || -z "${TEACHER:-}" ]]; then
    cat >&2 <<'USAGE'
usage: DATA=DIR TEACHER=FILE [OPTION=...] examples/dphubert/sweep.sh
  DATA, TEACHER                as in run.sh
options, with their defaults:
  SPARSITIES="0.5 0.65 0.75 0.85"   fractions to remove
  MEASURE=params               of what: params, macs
  LABELLED=DIR                 also runs each size to its end as run.sh does (its other options hold too), for error rates;
                               else the report shows the distillation loss of stage 1
  FAMILY=hubert_base           hubert_large, wav2vec2_base, wav2vec2_large, data2vec_base, wavlm_base_plus
  OUT=outputs/dphubert_FAMILY_sweep  folder of everything
  LAUNCHER=basic               one after the other here; submitit_slurm: a job each (pip install hydra-submitit-launcher)
  LAUNCHER_ARGS=""             of Slurm, e.g. "hydra.launcher.partition=gpu hydra.launcher.gpus_per_node=4
                               hydra.launcher.cpus_per_task=24 hydra.launcher.timeout_min=1440"
  TEACHER_RUN=RUN              what the report calls the teacher, e.g. the folder of its own fine-tuning and decoding
  ARGS, STAGE1_ARGS            more overrides
USAGE
    exit 2
fi
FAMILY=${FAMILY:-hubert_base}
SPARSITIES=${SPARSITIES:-0.5 0.65 0.75 0.85}
TEST=${TEST:-test_clean test_other} # the report takes the first
OUT=${OUT:-outputs/dphubert_${FAMILY}_sweep}
for sparsity in $SPARSITIES; do # as hydra prints them, since they name folders
    [[ $sparsity =~ ^0\.[0-9]*[1-9]$ ]] || { echo "SPARSITIES must be like 0.5 or 0.75, but has $sparsity" >&2; exit 2; }
done
# shellcheck source=examples/steps.sh
source examples/steps.sh

# The ARGS are lists of words: they are split on purpose.
# shellcheck disable=SC2086
step sweep fairseq-hydra-train -m --config-dir config/distill --config-name "dphubert_${FAMILY}_stage1" \
    "hydra.sweep.dir=$OUT/stage1" "hydra/launcher=${LAUNCHER:-basic}" ${LAUNCHER_ARGS:-} "task.data=$DATA" \
    "task.teacher_path=$TEACHER" "model.prune_measure=${MEASURE:-params}" "criterion.target_sparsity=${SPARSITIES// /,}" \
    ${ARGS:-} ${STAGE1_ARGS:-}

if [[ -z "${LABELLED:-}" ]]; then
    s3distill report "$OUT/stage1" --teacher "${TEACHER_RUN:-$TEACHER}" -o "$OUT/report.html"
    exit
fi
runs=()
for sparsity in $SPARSITIES; do
    run="$OUT/sparsity_$sparsity"
    STAGE1="$OUT/stage1/sparsity_$sparsity" OUT="$run" TEST="$TEST" bash examples/dphubert/run.sh
    runs+=("$run")
done
s3distill report "${runs[@]}" --join --teacher "${TEACHER_RUN:-$TEACHER}" --subset "${TEST%% *}" \
    -o "$OUT/report.html"
