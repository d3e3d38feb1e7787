#!/usr/bin/env bash
# A recogniser of language A learns language B: what does it forget of A, and what helps? See README.md beside this file.
# Run it again after an interruption: finished steps are skipped, and a training goes on from its last checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    cat >&2 <<'USAGE'
usage: [OPTION=...] examples/forgetting/run.sh
options, with their defaults:
  DATA_A= DATA_B=          folders of train, VALID and TEST (.tsv .ltr .wrd) and dict.ltr.txt; empty: demo speech
  LANGUAGES="en nl"        languages A and B of the demo speech
  MINUTES=6                of training speech per language
  OLD=FILE                 recogniser of A over the dictionary of both (OUT/dict); else a small one is trained on DATA_A
  BACKBONE=                pre-trained checkpoint that A's recogniser is fine-tuned from (with what config/quickstart/finetune says)
  OLD_UPDATES=900          of that training
  UPDATES=300              of each training on B
  LAMBDAS="0.01 0.1 1"    of EWC, over the Fisher information divided by its mean
  GAMMAS="0.1 1"           of task alignment
  REPLAY="0.2 0.5"         shares of A's training data in the batches
  FISHER_UTTERANCES=       of A that the Fisher information is the mean over; empty: all
  VALID=valid TEST=test    splits
  OUT=outputs/forgetting   folder of everything
  ARGS, OLD_ARGS, MASK_ARGS   more overrides: of all trainings, of A's, of the mask's
USAGE
    exit 2
fi
OUT=${OUT:-outputs/forgetting}
VALID=${VALID:-valid} TEST=${TEST:-test}
UPDATES=${UPDATES:-300}
# shellcheck source=examples/steps.sh
source examples/steps.sh
mkdir -p "$OUT"

if [[ -z "${DATA_A:-}" || -z "${DATA_B:-}" ]]; then
    read -r A B <<<"${LANGUAGES:-en nl}"
    step data s3distill demo-data "$OUT/data" --languages "$A,$B" --minutes "${MINUTES:-6}" --valid-minutes 0.5 --test-minutes 2
    DATA_A=$OUT/data/$A DATA_B=$OUT/data/$B
fi
DATA_A=$(realpath "$DATA_A") DATA_B=$(realpath "$DATA_B")
step dict python examples/forgetting/shared_dictionary.py "$OUT/dict" "$DATA_A" "$DATA_B"
DICT=$OUT/dict

decode() { # NAME CHECKPOINT DATA
    step "decode/$1" fairseq-generate "$3" --user-dir s3distill --task audio_ctc --labels ltr --target-dictionary "$DICT" --path "$2" \
        --gen-subset "$TEST" --batch-size 16 --post-process letter --scoring s3_wer --results-path "$OUT/decode/$1"
}

# The ARGS are lists of words: they are split on purpose.
# shellcheck disable=SC2086
learn_b() { # NAME OVERRIDE...: the recogniser of A goes on with B's data
    local name=$1
    shift
    step "$name" fairseq-hydra-train --config-dir config/forgetting --config-name demo "hydra.run.dir=$OUT/$name" "task.data=$DATA_B" \
        "task.target_dictionary=$DICT" "model.student_path=$OLD" "dataset.valid_subset=$VALID" "optimization.max_update=$UPDATES" \
        "dataset.validate_after_updates=$UPDATES" "$@" ${ARGS:-}
    decode "$name/a" "$(last "$name")" "$DATA_A"
    decode "$name/b" "$(last "$name")" "$DATA_B"
}

if [[ -z "${OLD:-}" ]]; then
    start=(--config-name teacher)
    if [[ -n "${BACKBONE:-}" ]]; then
        start=(--config-name finetune "model.w2v_path=$BACKBONE")
    fi
    # shellcheck disable=SC2086
    step before fairseq-hydra-train --config-dir config/quickstart "${start[@]}" "hydra.run.dir=$OUT/before" "task.data=$DATA_A" \
        "++task.target_dictionary=$DICT" "dataset.valid_subset=$VALID" "optimization.max_update=${OLD_UPDATES:-900}" \
        "dataset.validate_after_updates=${OLD_UPDATES:-900}" ${OLD_ARGS:-} ${ARGS:-}
    OLD=$(last before)
fi
decode before/a "$OLD" "$DATA_A"
decode before/b "$OLD" "$DATA_B"

rows=()
learn_b plain
for lambda in ${LAMBDAS:-0.01 0.1 1}; do
    step fisher s3distill fisher "$OLD" "$DATA_A/train.tsv" -o "$OUT/fisher.safetensors" \
        ${FISHER_UTTERANCES:+--max-utterances "$FISHER_UTTERANCES"}
    learn_b "ewc_$lambda" "criterion.ewc_paths=[$OUT/fisher.safetensors]" "criterion.ewc_lambda=$lambda" criterion.ewc_normalize=true
    rows+=("ewc_$lambda")
done
for gamma in ${GAMMAS:-0.1 1}; do
    learn_b "tac_$gamma" "criterion.old_model_paths=[$OLD]" "criterion.tac_gamma=$gamma"
    step "old_head_$gamma" s3distill old-head "$(last "tac_$gamma")" "$OLD" "$OUT/tac_$gamma/old_task.pt"
    decode "tac_$gamma/old_head" "$OUT/tac_$gamma/old_task.pt" "$DATA_A"
    rows+=("tac_$gamma")
done
for share in ${REPLAY:-0.2 0.5}; do
    learn_b "replay_$share" task.multi_corpus_keys="'new,old'" "dataset.train_subset='new:train,old:$DATA_A/train'" \
        "task.multi_corpus_sampling_weights='$(python3 -c "print(1 - $share)"),$share'"
    rows+=("replay_$share")
done
# shellcheck disable=SC2086
step mask fairseq-hydra-train --config-dir config/s3_router --config-name demo common.user_dir=s3distill "hydra.run.dir=$OUT/mask" \
    "task.data=$DATA_B" "++task.target_dictionary=$DICT" "model.w2v_path=$OLD" "dataset.valid_subset=$VALID" \
    "optimization.max_update=$UPDATES" ${MASK_ARGS:-} ${ARGS:-}
decode mask/b "$(last mask)" "$DATA_B"

python examples/forgetting/table.py "$OUT" "$TEST" plain "${rows[@]}" mask
