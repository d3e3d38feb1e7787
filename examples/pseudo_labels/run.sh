#!/usr/bin/env bash
# Pseudo-labels: a teacher of few labels transcribes a pool, and students learn from its 1-best or K-best, raw and filtered.
# Run it again after an interruption: finished steps are skipped, a decoding goes on at its last batch, a training from its last checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    cat >&2 <<'USAGE'
usage: [OPTION=...] examples/pseudo_labels/run.sh
options, with their defaults:
  DATA=OUT/demo           folder of train, valid and test (.tsv .ltr .wrd) and dict.ltr.txt; made of demo speech where it is missing
  LABELLED=200            utterances of train that keep their labels; the others are the pool
  TEACHER=FILE            a CTC model; else one is trained on the labelled utterances
  TEACHER_UPDATES=800     of that training
  STUDENT=TEACHER         CTC checkpoint that every student starts from, e.g. a compressed one
  UPDATES=200             of each student
  NBEST=4                 hypotheses of each utterance
  FILTERS="--max-loop 2 --min-score -0.03"   of the filtered labels, beside the compression ratio; see s3distill pseudo-label --help
  ROWS="..."              of: labelled gold raw_one_best raw_uniform raw_ranked filtered_one_best filtered_uniform filtered_ranked
  OUT=outputs/pseudo_labels   folder of everything
  ARGS, TEACHER_ARGS      more overrides: of the students' trainings, of the teacher's
USAGE
    exit 2
fi
OUT=${OUT:-outputs/pseudo_labels}
DATA=${DATA:-$OUT/demo}
UPDATES=${UPDATES:-200}
FILTERS=${FILTERS:---max-loop 2 --min-score -0.03}
ROWS=${ROWS:-labelled gold raw_one_best raw_uniform raw_ranked filtered_one_best filtered_uniform filtered_ranked}
# shellcheck source=examples/steps.sh
source examples/steps.sh

decode() { # RUN
    step "$1/decode" fairseq-generate "$OUT/data" --user-dir s3distill --task audio_ctc --labels ltr --path "$(last "$1")" \
        --gen-subset test --batch-size 16 --post-process letter --scoring s3_wer --results-path "$OUT/$1/decode"
}

# The ARGS and FILTERS are lists of words: they are split on purpose.
# shellcheck disable=SC2086
{
    labels() { # NAME FILTER...: the pool's pseudo-labels behind the labelled utterances
        local name=$1
        shift
        step "labels/$name" s3distill pseudo-label "$OUT/data/pool.tsv" --teacher "$TEACHER" -o "$OUT/labels/$name" --name train \
            --nbest "${NBEST:-4}" --add "$OUT/data/labelled.tsv" --reference wrd --overwrite "$@"
        step "labels/$name.valid" python examples/pseudo_labels/copy_split.py "$OUT/data" "$OUT/labels/$name" valid
    }
    student() { # NAME DATA SPLIT OVERRIDE...
        local name=$1 data=$2 split=$3
        shift 3
        step "$name/train" fairseq-hydra-train --config-dir config/quickstart --config-name finetune common.user_dir=s3distill \
            "hydra.run.dir=$OUT/$name" "task.data=$data" "dataset.train_subset=$split" task._name=audio_ctc_distill \
            model._name=wav2vec_ctc_student model.w2v_path=null "++model.student_path=${STUDENT:-$TEACHER}" \
            model.freeze_finetune_updates=0 model.apply_mask=true model.mask_prob=0.3 ++model.mask_length=5 \
            model.mask_channel_prob=0.1 ++model.mask_channel_length=16 criterion._name=ctc_distill ++criterion.alpha=1 "$@" \
            "optimization.max_update=$UPDATES" "optimization.lr=[0.0005]" "lr_scheduler.phase_ratio=[0.1,0.4,0.5]" \
            "dataset.validate_after_updates=$UPDATES" ${ARGS:-}
        decode "$name"
    }

    if [[ ! -f $DATA/train.tsv ]]; then
        step demo s3distill demo-data "$DATA"
    fi
    step data python examples/pseudo_labels/split.py "$DATA" "$OUT/data" --labelled "${LABELLED:-200}"
    if [[ -z "${TEACHER:-}" ]]; then
        step teacher/train fairseq-hydra-train --config-dir config/quickstart --config-name teacher common.user_dir=s3distill \
            "hydra.run.dir=$OUT/teacher" "task.data=$OUT/data" dataset.train_subset=labelled \
            "optimization.max_update=${TEACHER_UPDATES:-800}" "dataset.validate_after_updates=${TEACHER_UPDATES:-800}" ${TEACHER_ARGS:-}
        TEACHER=$(last teacher)
    else
        mkdir -p "$OUT/teacher/checkpoints"
        cp -u "$TEACHER" "$OUT/teacher/checkpoints/checkpoint_last.pt"
    fi
    decode teacher
    labels raw --codec none
    labels filtered $FILTERS

    for row in $ROWS; do
        case $row in
            labelled) student labelled "$OUT/data" labelled ;;
            gold) student gold "$DATA" train ;;
            raw_* | filtered_*)
                student "$row" "$OUT/labels/${row%%_*}" train ++task.nbest=true "++criterion.seq_kd=${row#*_}"
                ;;
            *) echo "ROWS has $row; see --help" >&2; exit 2 ;;
        esac
    done
    python examples/pseudo_labels/table.py "$OUT" teacher $ROWS | tee "$OUT/table.md"
}
