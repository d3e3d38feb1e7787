#!/usr/bin/env bash
# Many languages over one model: a mask per language against full fine-tuning with the same budget. See README.md beside this file.
# Run it again after an interruption: finished steps are skipped, and a training goes on from its last checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=examples/steps.sh
source examples/steps.sh

if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    cat >&2 <<'USAGE'
usage: [OPTION=...] examples/s3_router/multilingual.sh
options, with their defaults:
  LANGUAGES="en nl de es"      languages of the demo speech
  MINUTES=6                    of training speech per language
  DATA=                        your own: a folder with one corpus per language (DATA/en/train.tsv, .ltr, .wrd, dict.ltr.txt, ...)
  BACKBONE=                    pre-trained or fine-tuned checkpoint to mask; empty: a small one is trained on DATA/all (or BACKBONE_DATA) with CTC
  BACKBONE_DATA=DATA/all       manifests that the backbone is trained on
  VALID=valid TEST=test        splits to validate on and to decode
  OUT=outputs/s3_router        folder of everything
  ARGS, BACKBONE_ARGS, MASK_ARGS, FULL_ARGS, DECODE_ARGS   more overrides: of every fine-tuning, or of one kind
USAGE
    exit 2
fi
LANGUAGES=${LANGUAGES:-en nl de es}
OUT=${OUT:-outputs/s3_router}
VALID=${VALID:-valid}
TEST=${TEST:-test}
mkdir -p "$OUT"

# The ARGS are lists of words: they are split on purpose.
# shellcheck disable=SC2086
{
    if [[ -z "${DATA:-}" ]]; then
        DATA=$OUT/data
        step data s3distill demo-data "$DATA" --languages "${LANGUAGES// /,}" --minutes "${MINUTES:-6}" --valid-minutes 0.5 --test-minutes 2
    fi
    if [[ -z "${BACKBONE:-}" ]]; then
        step backbone fairseq-hydra-train --config-dir config/quickstart --config-name teacher common.user_dir=s3distill \
            "task.data=${BACKBONE_DATA:-$DATA/all}" "hydra.run.dir=$OUT/backbone" "dataset.valid_subset=$VALID" ${BACKBONE_ARGS:-}
        BACKBONE=$(last backbone)
    fi
    BANK=$OUT/bank.safetensors

    tune() { # NAME LANGUAGE OVERRIDES...: masks or weights, from the same backbone with the same number of updates
        local name=$1 language=$2
        shift 2
        step "$name" fairseq-hydra-train --config-dir config/s3_router --config-name demo common.user_dir=s3distill \
            "task.data=$DATA/$language" "model.w2v_path=$BACKBONE" "hydra.run.dir=$OUT/$name" "dataset.valid_subset=$VALID" "$@" ${ARGS:-}
    }
    decode() { # NAME LANGUAGE CHECKPOINT OPTIONS...
        local name=$1 language=$2 checkpoint=$3
        shift 3
        step "decode_$name" fairseq-generate "$DATA/$language" --user-dir s3distill --task audio_ctc --labels ltr --gen-subset "$TEST" \
            --batch-size 16 --path "$checkpoint" --post-process letter --scoring s3_wer --results-path "$OUT/decode/$name" "$@" ${DECODE_ARGS:-}
    }

    for language in $LANGUAGES; do
        tune "mask_$language" "$language" ${MASK_ARGS:-}
        tune "full_$language" "$language" model.prune_rate=1 model.co_train=true ${FULL_ARGS:-optimization.lr=[0.001]}
        step "pack_$language" s3distill masks pack "$(last "mask_$language")" --name "$language" --bank "$BANK" --backbone "$BACKBONE"
        decode "mask_$language" "$language" "$BACKBONE" --mask-bank "$BANK" --mask-name "$language"
        decode "full_$language" "$language" "$(last "full_$language")"
    done
}
s3distill masks list "$BANK" --json > "$OUT/bank.json"
python examples/s3_router/multilingual_table.py "$OUT" "$TEST" $LANGUAGES
if [[ $(wc -w <<<"$LANGUAGES") -gt 2 ]]; then
    s3distill masks inventory --languages "${LANGUAGES// /,}" -o "$OUT/similarity/phonemes.csv"
    s3distill masks similarity "$BANK" --reference "$OUT/similarity/phonemes.csv" -o "$OUT/similarity"
fi
