#!/usr/bin/env bash
# What each ingredient of ctc_distill is worth: students of one fine-tuned teacher, with few labels, with and without each of them.
# Run it again after an interruption: finished steps are skipped, and a training goes on from its last checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

ALL_ROWS="ctc logits temperature unsure hidden unlabelled confident mixup matching joint_ctc joint_logits joint"
if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    cat >&2 <<USAGE
usage: [OPTION=...] examples/ctc_distill/run.sh
options, with their defaults:
  DATA=OUT/demo           folder of train, valid and test (.tsv .ltr .wrd) and dict.ltr.txt; made of demo speech where it is missing
  TEACHER=FILE            a CTC model of the quickstart's shape; else it is trained on DATA
  LABELLED=100            utterances of train whose labels the students see; the others are the pool without labels
  STUDENT=FILE            pre-trained encoder that the students start from; else two layers of the teacher, distilled on the pool
  DISTILL_UPDATES=100     of that distillation
  UPDATES=300             of each student
  ROWS="..."              of: $ALL_ROWS
  OUT=outputs/ctc_distill folder of everything
  ARGS, TEACHER_ARGS      more overrides: of all trainings, of the teacher's
USAGE
    exit 2
fi
OUT=${OUT:-outputs/ctc_distill}
DATA=${DATA:-$OUT/demo}
UPDATES=${UPDATES:-300}
DISTILL_UPDATES=${DISTILL_UPDATES:-100}
# shellcheck source=examples/steps.sh
source examples/steps.sh

decode() { # NAME CHECKPOINT
    step "$1/decode" fairseq-generate "$OUT/data" --user-dir s3distill --task audio_ctc --labels ltr --path "$2" \
        --gen-subset test --batch-size 16 --post-process letter --scoring s3_wer --results-path "$OUT/$1/decode"
}

# The ARGS are lists of words: they are split on purpose.
# shellcheck disable=SC2086
train() { # NAME RECIPE OVERRIDE...
    local name=$1 recipe=$2
    shift 2
    step "$name/train" fairseq-hydra-train --config-dir config/ctc_distill --config-name "$recipe" "hydra.run.dir=$OUT/$name" \
        "task.data=$OUT/data" "task.teacher_path=$TEACHER" dataset.train_subset=labelled "$@" \
        "optimization.max_update=$UPDATES" "dataset.validate_after_updates=$UPDATES" ${ARGS:-}
}

student() { # NAME RECIPE OVERRIDE...
    train "$@" "model.w2v_path=$STUDENT"
    decode "$1" "$(last "$1")"
}

joint() { # NAME OVERRIDE...: the teacher itself, with gates, cut
    local name=$1
    shift
    train "$name" joint "criterion.sparsity_warmup=$((UPDATES / 4))" "$@"
    step "$name/prune" s3distill prune "$(last "$name")" "$OUT/$name/compact.pt" --audio "$OUT/data/valid.tsv"
    decode "$name" "$OUT/$name/compact.pt"
}

row() {
    local pool=(task.unlabelled_subset=pool task.unlabelled_weight=0.8)
    case $1 in
    ctc) student ctc logits criterion.alpha=1 ;;
    logits) student logits logits ;;
    temperature) student temperature logits criterion.temperature=2 ;;
    unsure) student unsure logits criterion.blank_frames=unsure ;;
    hidden) student hidden logits criterion.hidden_weight=0.1 "model.distill_layers='1:3,2:6'" ;;
    unlabelled) student unlabelled logits "${pool[@]}" ;;
    confident) student confident logits "${pool[@]}" ++criterion.confidence=utterances ;;
    mixup) student mixup logits "${pool[@]}" ++criterion.mixup_alpha=1 ++criterion.mixup_prob=0.5 ;;
    matching) student matching function_matching "${pool[@]}" ;;
    joint_ctc) joint joint_ctc criterion.alpha=1 criterion.hidden_weight=0 "model.distill_layers=''" ;;
    joint_logits) joint joint_logits criterion.hidden_weight=0 "model.distill_layers=''" ;;
    joint) joint joint ;;
    *)
        echo "no row $1; there are $ALL_ROWS" >&2
        return 2 ;;
    esac
}

if [[ ! -f $DATA/train.tsv ]]; then
    step data s3distill demo-data "$DATA"
fi
if [[ -z "${TEACHER:-}" ]]; then
    # shellcheck disable=SC2086
    step teacher/train fairseq-hydra-train --config-dir config/quickstart --config-name teacher "hydra.run.dir=$OUT/teacher" \
        "task.data=$DATA" ${TEACHER_ARGS:-} ${ARGS:-}
else
    mkdir -p "$OUT/teacher/checkpoints"
    cp -u "$TEACHER" "$(last teacher)"
fi
TEACHER=$(last teacher)
step split python3 examples/pseudo_labels/split.py "$DATA" "$OUT/data" --labelled "${LABELLED:-100}"
if [[ -z "${STUDENT:-}" ]]; then
    # shellcheck disable=SC2086
    step student/train fairseq-hydra-train --config-dir config/distill --config-name student student=distilhubert \
        "hydra.run.dir=$OUT/student" "task.data=$OUT/data" "task.teacher_path=$TEACHER" task.teacher_dtype=float32 task.normalize=true \
        task.enable_padding=true task.min_sample_size=null task.max_sample_size=null common.fp16=false common.log_interval=20 \
        dataset.num_workers=0 dataset.batch_size=8 dataset.max_tokens=null dataset.train_subset=pool dataset.valid_subset=valid \
        "optimization.max_update=$DISTILL_UPDATES" "optimization.lr=[0.001]" optimization.clip_norm=10 \
        "lr_scheduler.warmup_updates=$((DISTILL_UPDATES / 8))" "model.distill_layers='2,4,6'" model.dropout=0 \
        model.attention_dropout=0 model.activation_dropout=0 model.dropout_input=0 ${ARGS:-}
    STUDENT=$(last student)
fi
decode teacher "$TEACHER"

runs=()
for name in ${ROWS:-$ALL_ROWS}; do
    row "$name"
    runs+=("$OUT/$name")
done
s3distill report "${runs[@]}" --teacher "$OUT/teacher" -o "$OUT/report.html" \
    --title "Students of one recogniser, ${LABELLED:-100} labelled utterances, $UPDATES updates" | tee "$OUT/table.md"
