#!/usr/bin/env bash
# Several classification tasks over one model: a mask per task against full fine-tuning and a head alone, with the same number of updates.
# See README.md beside this file. Run it again after an interruption: finished steps are skipped, and a training goes on from its last
# checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=examples/steps.sh
source examples/steps.sh

if [[ -z "${DATA:-}" || "${1:-}" == -h || "${1:-}" == --help ]]; then
    cat >&2 <<'USAGE'
usage: DATA=DIR [OPTION=...] examples/s3_router/labels.sh
  DATA      folder of train.tsv and test.tsv with one label file per task (train.digit, test.digit, train.speaker, ...: one class name a line)
options, with their defaults:
  LABELS="digit speaker"      tasks: endings of the label files
  BACKBONE=                   pre-trained or fine-tuned checkpoint to mask; empty: a small one is trained with CTC on demo speech
  BACKBONE_DATA=              ... or on these manifests (train and valid: .tsv .ltr .wrd, dict.ltr.txt)
  TEST=test VALID=$TEST       split of the table; split that trainings report on (their last checkpoint is used, whatever it says)
  OUT=outputs/s3_router_labels   folder of everything
  ARGS, BACKBONE_ARGS, MASK_ARGS, FULL_ARGS, HEAD_ARGS   more overrides: of every fine-tuning, or of one kind
  (FULL_ARGS=optimization.lr=[0.0003] by default: weights want smaller steps than scores)
USAGE
    exit 2
fi
LABELS=${LABELS:-digit speaker}
OUT=${OUT:-outputs/s3_router_labels}
TEST=${TEST:-test}
VALID=${VALID:-$TEST}
mkdir -p "$OUT"

# The ARGS and LABELS are lists of words: they are split on purpose.
# shellcheck disable=SC2086
{
    if [[ -z "${BACKBONE:-}" ]]; then
        if [[ -z "${BACKBONE_DATA:-}" ]]; then
            BACKBONE_DATA=$OUT/data
            step data s3distill demo-data "$BACKBONE_DATA"
        fi
        step backbone fairseq-hydra-train --config-dir config/quickstart --config-name teacher common.user_dir=s3distill \
            "task.data=$BACKBONE_DATA" "hydra.run.dir=$OUT/backbone" ${BACKBONE_ARGS:-}
        BACKBONE=$(last backbone)
    fi

    tune() { # NAME LABELS OVERRIDES...: from the same backbone, with the same batches and the same number of updates
        local name=$1 labels=$2
        shift 2
        step "$name" fairseq-hydra-train --config-dir config/s3_router --config-name labels common.user_dir=s3distill \
            "task.data=$DATA" "task.labels=$labels" "model.w2v_path=$BACKBONE" "hydra.run.dir=$OUT/$name" "dataset.valid_subset=$VALID" \
            "$@" ${ARGS:-}
    }

    for labels in $LABELS; do
        tune "mask_$labels" "$labels" ${MASK_ARGS:-}
        tune "full_$labels" "$labels" model.prune_rate=1 model.co_train=true ${FULL_ARGS:-optimization.lr=[0.0003]}
        tune "head_$labels" "$labels" model.prune_rate=1 ${HEAD_ARGS:-}
    done
    python examples/s3_router/labels_table.py "$OUT" "$DATA" "$TEST" $LABELS
}
