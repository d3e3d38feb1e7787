#!/usr/bin/env bash
# DPHuBERT from start to end: stage 1 -> prune -> stage 2 -> CTC fine-tuning -> decoding. See README.md beside this file.
# Run it again after an interruption: finished steps are skipped, and a training goes on from its last checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [[ -z "${DATA:-}" || -z "${TEACHER:-}" || -z "${LABELLED:-}" ]]; then
    cat >&2 <<'USAGE'
usage: DATA=DIR TEACHER=FILE LABELLED=DIR [OPTION=...] examples/dphubert/run.sh
  DATA      folder of train.tsv and valid.tsv, for distillation (e.g. LibriSpeech 960 h)
  TEACHER   pre-trained checkpoint or Hugging Face folder, e.g. hubert_base_ls960.pt
  LABELLED  folder of train, dev_other and the test splits (.tsv, .ltr) and dict.ltr.txt, for fine-tuning and decoding
options, with their defaults:
  FAMILY=hubert_base           hubert_large, wav2vec2_base, wav2vec2_large, data2vec_base, wavlm_base_plus
  FINETUNE=librispeech_100h    librispeech_10h, librispeech_1h
  TEST="test_clean test_other" splits to decode
  OUT=outputs/dphubert_FAMILY  folder of everything
  STAGE1=FOLDER                a finished stage 1, such as a job of sweep.sh; else it is trained here
  ARGS, STAGE1_ARGS, STAGE2_ARGS, FINETUNE_ARGS, DECODE_ARGS   more overrides: of all trainings, or of one step
without a GPU: ARGS=common.fp16=false STAGE1_ARGS=task.teacher_dtype=float32 STAGE2_ARGS=task.teacher_dtype=float32
USAGE
    exit 2
fi
FAMILY=${FAMILY:-hubert_base}
FINETUNE=${FINETUNE:-librispeech_100h}
TEST=${TEST:-test_clean test_other}
OUT=${OUT:-outputs/dphubert_$FAMILY}
recipe=config/distill/dphubert_${FAMILY}_stage1.yaml
[[ -f $recipe ]] || { echo "FAMILY=$FAMILY has no recipe $recipe" >&2; exit 2; }
normalize=$(sed -n 's/^  normalize: \([a-z]*\).*/\1/p' "$recipe") # as the teacher was trained

# shellcheck source=examples/steps.sh
source examples/steps.sh

# The ARGS are lists of words: they are split on purpose.
# shellcheck disable=SC2086
{
    if [[ -z "${STAGE1:-}" ]]; then
        step stage1 fairseq-hydra-train --config-dir config/distill --config-name "dphubert_${FAMILY}_stage1" \
            "hydra.run.dir=$OUT/stage1" "task.data=$DATA" "task.teacher_path=$TEACHER" ${ARGS:-} ${STAGE1_ARGS:-}
    fi

    mkdir -p "$OUT"
    step prune s3distill prune "${STAGE1:-$OUT/stage1}/checkpoints/checkpoint_last.pt" "$OUT/compact.pt"

    step stage2 fairseq-hydra-train --config-dir config/distill --config-name "dphubert_${FAMILY}_stage2" \
        "hydra.run.dir=$OUT/stage2" "task.data=$DATA" "task.teacher_path=$TEACHER" "model.student_path=$OUT/compact.pt" \
        ${ARGS:-} ${STAGE2_ARGS:-}

    step finetune fairseq-hydra-train --config-dir config/finetuning --config-name "$FINETUNE" \
        "hydra.run.dir=$OUT/finetune" "task.data=$LABELLED" "task.normalize=$normalize" "model.w2v_path=$(last stage2)" \
        ${ARGS:-} ${FINETUNE_ARGS:-}

    for split in $TEST; do
        step "decode_$split" fairseq-generate "$LABELLED" --user-dir s3distill --task audio_ctc --labels ltr \
            --path "$(last finetune)" --gen-subset "$split" --max-tokens 3200000 --post-process letter \
            --scoring s3_wer --results-path "$OUT/decode" ${DECODE_ARGS:-}
    done
}

step inspect s3distill inspect "$(last finetune)"
