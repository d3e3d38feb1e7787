#!/usr/bin/env bash
# Every student from one teacher, at the same number of updates and about the same MACs: distil, fine-tune with CTC, decode, report.
# Run it again after an interruption: finished steps are skipped, and a training goes on from its last checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    cat >&2 <<'USAGE'
usage: [OPTION=...] examples/compare/run.sh
options, with their defaults:
  DATA=OUT/data           folder of train, VALID and TEST (.tsv .ltr .wrd) and dict.ltr.txt; made of demo speech where it is missing
  TEACHER=FILE            a teacher of the quickstart's shape; else it is trained on DATA with CTC
  UPDATES=300             of each distillation; DPHuBERT's two stages share them, 2 to 1
  FINETUNE_UPDATES=350    the first 200 with a frozen encoder
  STUDENTS="..."          of students.sh; default: all
  VALID=valid TEST=test   splits
  JOBS=1                  students at a time
  OUT=outputs/compare     folder of everything
  ARGS, TEACHER_ARGS      more overrides: of all trainings, of the teacher's
USAGE
    exit 2
fi
OUT=${OUT:-outputs/compare}
DATA=${DATA:-$OUT/data}
UPDATES=${UPDATES:-300}
FINETUNE_UPDATES=${FINETUNE_UPDATES:-350}
VALID=${VALID:-valid} TEST=${TEST:-test}
MACS_KEPT=0.38 # of the teacher's
# shellcheck source=examples/steps.sh
source examples/steps.sh
# shellcheck source=examples/compare/students.sh
source examples/compare/students.sh

decode() { # NAME: the fine-tuned model of that name
    step "$1/decode" fairseq-generate "$DATA" --user-dir s3distill --task audio_ctc --labels ltr --path "$(last "$2")" \
        --gen-subset "$TEST" --batch-size 16 --post-process letter --scoring s3_wer --results-path "$OUT/$1/decode"
}

# The ARGS are lists of words: they are split on purpose.
# shellcheck disable=SC2086
distil() { # NAME CONFIG UPDATES OVERRIDE...: one distillation, in small batches and without a GPU's precision
    local name=$1 config=$2 updates=$3
    shift 3
    step "$name" fairseq-hydra-train --config-dir config/distill --config-name "$config" "$@" "hydra.run.dir=$OUT/$name" \
        "task.data=$DATA" "task.teacher_path=$TEACHER" task.teacher_dtype=float32 task.normalize=true task.enable_padding=true \
        task.min_sample_size=null task.max_sample_size=null common.fp16=false common.log_interval=20 dataset.num_workers=0 \
        dataset.batch_size=8 dataset.max_tokens=null "dataset.valid_subset=$VALID" dataset.validate_interval_updates=100 \
        "optimization.max_update=$updates" "optimization.lr=[0.001]" optimization.clip_norm=10 \
        "lr_scheduler.warmup_updates=$((updates / 8))" checkpoint.save_interval_updates=100 \
        model.dropout=0 model.attention_dropout=0 model.activation_dropout=0 model.dropout_input=0 ${ARGS:-}
}

# shellcheck disable=SC2086
student() { # NAME: from distillation to error rates
    local name=$1 start shape=()
    if [[ $name == dphubert ]]; then
        local stage1=$((UPDATES * 2 / 3))
        distil dphubert/stage1 dphubert_hubert_base_stage1 "$stage1" "model.distill_layers='0,2,4,6'" model.prune_measure=macs \
            "criterion.target_sparsity=$(python3 -c "print(1 - $MACS_KEPT)")" "criterion.sparsity_warmup=$((stage1 / 4))" \
            optimizer.gate_lr=0.2 optimizer.multiplier_lr=0.6
        step dphubert/prune s3distill prune "$(last dphubert/stage1)" "$OUT/dphubert/compact.pt" --audio "$DATA/$VALID.tsv"
        distil dphubert/stage2 dphubert_hubert_base_stage2 $((UPDATES - stage1)) "model.distill_layers='0,2,4,6'" \
            "model.student_path=$OUT/dphubert/compact.pt"
        start=dphubert/stage2
    else
        shape_of "$name"
        distil "$name/distil" student "$UPDATES" "student=$name" "${shape[@]}"
        start=$name/distil
    fi
    step "$name/finetune" fairseq-hydra-train --config-dir config/quickstart --config-name finetune \
        "hydra.run.dir=$OUT/$name/finetune" "task.data=$DATA" "model.w2v_path=$(last "$start")" "dataset.valid_subset=$VALID" \
        "optimization.max_update=$FINETUNE_UPDATES" "dataset.validate_after_updates=$FINETUNE_UPDATES" ${ARGS:-}
    decode "$name" "$name/finetune"
}

if [[ ! -f $DATA/train.tsv ]]; then
    step data s3distill demo-data "$DATA"
fi
if [[ -z "${TEACHER:-}" ]]; then
    # shellcheck disable=SC2086
    step teacher/ctc fairseq-hydra-train --config-dir config/quickstart --config-name teacher "hydra.run.dir=$OUT/teacher/ctc" \
        "task.data=$DATA" "dataset.valid_subset=$VALID" ${TEACHER_ARGS:-} ${ARGS:-}
    TEACHER=$(last teacher/ctc)
else
    mkdir -p "$OUT/teacher/ctc/checkpoints"
    cp -u "$TEACHER" "$OUT/teacher/ctc/checkpoints/checkpoint_last.pt"
fi
decode teacher teacher/ctc

runs=()
running=0
for name in ${STUDENTS:-$ALL_STUDENTS}; do
    runs+=("$OUT/$name")
    if ((${JOBS:-1} == 1)); then
        student "$name"
        continue
    fi
    if ((running >= JOBS)); then
        wait -n || { echo "a student failed: see $OUT/*.log" >&2; wait; exit 1; }
        running=$((running - 1))
    fi
    (set -e; student "$name") >"$OUT/$name.log" 2>&1 &
    running=$((running + 1))
    echo "[$name] began; its output is in $OUT/$name.log"
done
while ((running > 0)); do
    wait -n || { echo "a student failed: see $OUT/*.log" >&2; wait; exit 1; }
    running=$((running - 1))
done

s3distill report "${runs[@]}" --teacher "$OUT/teacher" --subset "$TEST" -o "$OUT/report.html" \
    --title "Students of one teacher, $UPDATES updates of distillation each" | tee "$OUT/table.md"
