#!/usr/bin/env bash
# Noisy student: teacher -> pseudo-labels -> filters -> augmented student -> new teacher, until the valid set says that it is enough.
# Run it again after an interruption: finished steps are skipped, a decoding goes on at its last batch, a training from its last checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [[ "${1:-}" == -h || "${1:-}" == --help || -z "${TEACHER:-}" || -z "${DATA:-}" ]]; then
    cat >&2 <<'USAGE'
usage: TEACHER=FILE DATA=FOLDER [OPTION=...] examples/noisy_student/run.sh
  TEACHER=FILE            the first teacher: a CTC model of the labelled data
  DATA=FOLDER             labelled, pool and valid: .tsv, and .ltr .wrd but for the pool, with dict.ltr.txt
                          (examples/pseudo_labels/split.py makes such a folder of labelled data)
options, with their defaults:
  LABELLED=labelled POOL=pool VALID=valid    splits
  TEST=                   a split to decode with the last teacher; empty: none
  GENERATIONS=3           students at most
  MIN_GAIN=0.1            a generation that lowers the WER on VALID by less than this, in percent points, is the last
  STUDENT=                CTC checkpoint that every student starts from; empty: its teacher
  UPDATES=200             of each student
  NBEST=1                 hypotheses of each utterance; above 1 they are weighted by SEQ_KD=ranked
  FILTERS="--max-loop 2 --keep-best 0.75"   beside the compression ratio; see s3distill pseudo-label --help
  NOISE="..."             the students' augmentation: SpecAugment and dropout overrides
  OUT=outputs/noisy_student   folder of everything
  ARGS                    more overrides of the students' trainings
USAGE
    exit 2
fi
OUT=${OUT:-outputs/noisy_student}
VALID=${VALID:-valid}
NBEST=${NBEST:-1}
UPDATES=${UPDATES:-200}
FILTERS=${FILTERS:---max-loop 2 --keep-best 0.75}
NOISE=${NOISE:-model.apply_mask=true model.mask_prob=0.3 ++model.mask_length=5 model.mask_channel_prob=0.1 \
++model.mask_channel_length=16 model.dropout=0.1 model.activation_dropout=0.1}
# shellcheck source=examples/steps.sh
source examples/steps.sh

decode() { # NAME CHECKPOINT SPLIT
    step "$1/decode_$3" fairseq-generate "$DATA" --user-dir s3distill --task audio_ctc --labels ltr --path "$2" --gen-subset "$3" \
        --batch-size 16 --post-process letter --scoring s3_wer --results-path "$OUT/$1/decode"
}

wer() { # NAME SPLIT
    python -c 'import json, sys; print(json.load(open(sys.argv[1]))["wer"])' "$OUT/$1/decode/scores-$2.json"
}

# The ARGS, FILTERS and NOISE are lists of words: they are split on purpose.
# shellcheck disable=SC2086
student() { # NAME TEACHER
    local labels=$OUT/$1/labels sequence=()
    step "$1/labels" s3distill pseudo-label "$DATA/${POOL:-pool}.tsv" --teacher "$2" -o "$labels" --name train --nbest "$NBEST" \
        --add "$DATA/${LABELLED:-labelled}.tsv" --overwrite $FILTERS
    step "$1/valid" python examples/pseudo_labels/copy_split.py "$DATA" "$labels" "$VALID"
    if ((NBEST > 1)); then
        sequence=(++task.nbest=true "++criterion.seq_kd=${SEQ_KD:-ranked}")
    fi
    step "$1/train" fairseq-hydra-train --config-dir config/quickstart --config-name finetune common.user_dir=s3distill \
        "hydra.run.dir=$OUT/$1" "task.data=$labels" "dataset.valid_subset=$VALID" task._name=audio_ctc_distill \
        model._name=wav2vec_ctc_student model.w2v_path=null "++model.student_path=${STUDENT:-$2}" model.freeze_finetune_updates=0 \
        $NOISE criterion._name=ctc_distill ++criterion.alpha=1 ${sequence[@]+"${sequence[@]}"} \
        "optimization.max_update=$UPDATES" "optimization.lr=[0.0005]" "lr_scheduler.phase_ratio=[0.1,0.4,0.5]" \
        "dataset.validate_after_updates=$UPDATES" ${ARGS:-}
    decode "$1" "$(last "$1")" "$VALID"
}

decode teacher "$TEACHER" "$VALID"
best=teacher checkpoint=$TEACHER
best_wer=$(wer teacher "$VALID")
table="| generation | WER on $VALID % |\n|---|---|\n| teacher | $best_wer |\n"
for ((generation = 1; generation <= ${GENERATIONS:-3}; generation++)); do
    name=generation$generation
    student "$name" "$checkpoint"
    now=$(wer "$name" "$VALID")
    table+="| $generation | $now |\n"
    gain=$(python -c 'import sys; print(round(float(sys.argv[1]) - float(sys.argv[2]), 4))' "$best_wer" "$now")
    if python -c 'import sys; sys.exit(float(sys.argv[1]) <= 0)' "$gain"; then
        best=$name checkpoint=$(last "$name") best_wer=$now
    fi
    if python -c 'import sys; sys.exit(float(sys.argv[1]) >= float(sys.argv[2]))' "$gain" "${MIN_GAIN:-0.1}"; then
        echo "[$name] gained $gain points, less than MIN_GAIN=${MIN_GAIN:-0.1}: stop"
        break
    fi
done
if [[ -n "${TEST:-}" ]]; then
    decode teacher "$TEACHER" "$TEST"
    decode "$best" "$checkpoint" "$TEST"
    table+="\nWER on $TEST: teacher $(wer teacher "$TEST") %, $best $(wer "$best" "$TEST") %\n"
fi
printf '%b' "$table" | tee "$OUT/table.md"
echo "the best model is $checkpoint"
