#!/usr/bin/env bash
# Students with a decoder: on labels alone, with word-level and with sequence-level distillation from one teacher; decode, table.
# Run it again after an interruption: finished steps are skipped, and a training goes on from its last checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    cat >&2 <<'USAGE'
usage: [OPTION=...] examples/seq2seq/run.sh
options, with their defaults:
  QUICKSTART=outputs/quickstart   output folder of `s3distill quickstart`, which is run there if it is missing; for these three:
  DATA=QUICKSTART/data            folder of train, VALID and TEST (.tsv .ltr .wrd) and dict.ltr.txt
  TEACHER_ENCODER=QUICKSTART/teacher/checkpoints/checkpoint_last.pt   encoder under the teacher's decoder
  STUDENT_ENCODER=QUICKSTART/stage2/checkpoints/checkpoint_last.pt    encoder under each student's
  TEACHER_UPDATES=300 UPDATES=100   of the teacher's decoder (its encoder stays as it is), of each student
  STUDENTS="random labels word one_best k_best"
  SEEDS="1"                       of the students
  NBEST=3 BEAM=5                  hypotheses per utterance of train, and the beam that finds them
  VALID=valid TEST=test           splits
  OUT=outputs/seq2seq             folder of everything
  ARGS, TEACHER_ARGS              more overrides: of all trainings, of the teacher's
USAGE
    exit 2
fi
OUT=${OUT:-outputs/seq2seq}
QUICKSTART=${QUICKSTART:-outputs/quickstart}
DATA=${DATA:-$QUICKSTART/data}
TEACHER_ENCODER=${TEACHER_ENCODER:-$QUICKSTART/teacher/checkpoints/checkpoint_last.pt}
STUDENT_ENCODER=${STUDENT_ENCODER:-$QUICKSTART/stage2/checkpoints/checkpoint_last.pt}
TEACHER_UPDATES=${TEACHER_UPDATES:-300}
UPDATES=${UPDATES:-100}
BEAM=${BEAM:-5}
VALID=${VALID:-valid} TEST=${TEST:-test}
# shellcheck source=examples/steps.sh
source examples/steps.sh

# The ARGS are lists of words: they are split on purpose.
# shellcheck disable=SC2086
train() { # NAME CONFIG UPDATES OVERRIDE...
    local name=$1 config=$2 updates=$3
    shift 3
    step "$name/train" fairseq-hydra-train --config-dir config/seq2seq --config-name "$config" "hydra.run.dir=$OUT/$name" \
        "task.data=$DATA" "dataset.valid_subset=$VALID" "optimization.max_update=$updates" "$@" ${ARGS:-}
}

decode() { # NAME RUN SPLIT OPTION...: beam search
    local name=$1 run=$2 split=$3
    shift 3
    step "$name" fairseq-generate "$DATA" --user-dir s3distill --task audio_ctc --labels ltr --path "$(last "$run")" \
        --gen-subset "$split" --batch-size 16 --beam "$BEAM" --post-process letter --scoring s3_wer --results-path "$OUT/$name" "$@"
}

student() { # NAME SEED: the same encoder and updates, another loss
    local kind=$1 run=$1/seed$2 recipe
    local common=("task.teacher_path=$TEACHER" "model.w2v_path=$STUDENT_ENCODER" "common.seed=$2")
    case $kind in
    random) recipe=(word_level "$UPDATES" criterion.alpha=1 model.decoder_path=null "model.decoder_init_layers=''") ;;
    labels) recipe=(word_level "$UPDATES" criterion.alpha=1) ;;
    word) recipe=(word_level "$UPDATES") ;;
    one_best) recipe=(sequence_level "$UPDATES" criterion.seq_kd=one_best "task.nbest_dir=$OUT/lists") ;;
    k_best) recipe=(sequence_level "$UPDATES" "task.nbest_dir=$OUT/lists") ;;
    *)
        echo "no student $kind; there are random, labels, word, one_best and k_best" >&2
        return 2 ;;
    esac
    train "$run" "${recipe[@]}" "${common[@]}"
    decode "$run/decode" "$run" "$TEST"
}

if [[ ! -e $TEACHER_ENCODER || ! -e $STUDENT_ENCODER || ! -e $DATA/train.tsv ]]; then
    step quickstart s3distill quickstart --out "$QUICKSTART"
fi
# shellcheck disable=SC2086
train teacher finetune "$TEACHER_UPDATES" "model.w2v_path=$TEACHER_ENCODER" "model.freeze_finetune_updates=$TEACHER_UPDATES" ${TEACHER_ARGS:-}
TEACHER=$(last teacher)
decode teacher/decode teacher "$TEST"
decode lists teacher train --nbest "${NBEST:-3}"
for seed in ${SEEDS:-1}; do
    for kind in ${STUDENTS:-random labels word one_best k_best}; do
        student "$kind" "$seed"
    done
done
python examples/seq2seq/table.py "$OUT" "$TEST" | tee "$OUT/table.md"
