#!/usr/bin/env bash
# The whole way for one variant: shards, conversion, training, evaluation on other manuals, answers of the stock form.
#
#   MODEL_DIR=models/letters RAW_DIR=raw bash benchmarks/quality/manuals/run_variant.sh base
#   MODEL_DIR=work/runs/base/hf RAW_DIR=raw bash benchmarks/quality/manuals/run_variant.sh pixels|half|block|x4
#
# base: learns to read with all tokens; the others start from it. pixels: all tokens. half: max_pixels is a quarter of a
# crop's pixels. x4: DCT tokens, as many as half has. block: the pixels of x4's blocks, by the stock form of the same start.
# MODEL_DIR is a pixel Qwen2-VL, RAW_DIR has train/ and test/ as make_samples.py writes them. Everything is written to
# WORK_DIR; what is there already is not made again, so that variants share shards and a stopped run goes on.
# Steps, samples of a step and their order are the same for all variants. Other settings of qwen_launch.sh come from the
# environment, further arguments go to finetune_qwen2vl.py: --engine automodel where there is no GPU.
# STAGES chooses some of shards, convert, train, answer: converted one after the other, variants can train side by side.
set -euo pipefail

variant=${1:?usage: run_variant.sh base|pixels|half|block|x4 [arguments of finetune_qwen2vl.py]}
shift
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
MODEL_DIR=$(realpath "${MODEL_DIR:?a Hugging Face directory of a pixel Qwen2-VL}")
RAW_DIR=$(realpath "${RAW_DIR:?the folder that make_samples.py wrote}")
WORK_DIR=$(realpath -m "${WORK_DIR:-work}")
CROP_PIXELS=${CROP_PIXELS:-$((56 * 336))}  # height times width of a crop, of make_samples.py
NEW_TOKENS=${NEW_TOKENS:-128}              # of the longest answer
EVALUATION_BATCH=${EVALUATION_BATCH:-256}  # questions answered at a time
COMPARED=${COMPARED:-16}                   # questions that the stock form is asked
STAGES=${STAGES:-shards convert train answer}
export NUM_PROC_PER_NODE=${NUM_PROC_PER_NODE:-1} NUM_WORKERS=${NUM_WORKERS:-8}
export MBS=${MBS:-512} SEQ_LENGTH=${SEQ_LENGTH:-384} MAX_STEPS=${MAX_STEPS:-3000} MIN_LR=${MIN_LR:-1e-5}
export GBS=${GBS:-$MBS} WARMUP_STEPS=${WARMUP_STEPS:-100}
export VAL_INTERVAL=${VAL_INTERVAL:-500} SAVE_INTERVAL=${SAVE_INTERVAL:-500}

cd "$here"
if [ -z "${PYTHON:-}" ]; then
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON=python; fi
fi
export PYTHON

case $variant in
  base) format=base pixels=$CROP_PIXELS LR=${LR:-5e-4} ;;
  pixels) format=exact pixels=$CROP_PIXELS ;;
  half) format=exact pixels=$((CROP_PIXELS / 4)) ;;
  block) format=block pixels=$CROP_PIXELS ;;
  x4) format=x4 pixels=$CROP_PIXELS ;;
  *) echo "run_variant.sh: the variant is base, pixels, half, block or x4, not $variant" >&2; exit 2 ;;
esac

export LR=${LR:-3e-4}
run=$WORK_DIR/runs/$variant
say() { echo "=== $variant: $1, $(date +%T)"; }

shards() {
  say "shards"
  for split in train test; do
    shares=1,0,0  # the test set is a set of its own, and all of it is asked
    if [ "$split" = train ]; then shares=${TRAIN_SPLIT:-99,1,0}; fi
    "$PYTHON" data_preparation.py --data-dir "$RAW_DIR/$split" --output-dir "$WORK_DIR/shards/$split" \
      --split "$shares" --maxcount "${MAXCOUNT:-1000}" --no-report --energon-prepare
  done
}

conversion() {
  say "conversion"
  case $format in
    base) convert base --model-dir "$MODEL_DIR" --dct exact ;;
    block)
      convert x4 --model-dir "$MODEL_DIR" --dct x4
      convert block --model-dir "$WORK_DIR/models/x4" --to stock
      ;;
    *) convert "$format" --model-dir "$MODEL_DIR" --dct "$format" ;;
  esac
}

convert() {  # name of the model, arguments
  local output=$WORK_DIR/models/$1
  shift
  [ -d "$output" ] || "$PYTHON" convert_checkpoint.py --output-dir "$output" "$@"
}

train() {
  say "training"
  if [ "$format" = block ]; then set -- --dct none "$@"; fi
  MODEL_DIR="$WORK_DIR/models/$format" DATASET_DIR="$WORK_DIR/shards/train" OUTPUT_DIR="$WORK_DIR/runs" \
    EXPERIMENT_NAME=$variant MAXPIXELS=$pixels MINPIXELS=${MINPIXELS:-3136} \
    bash qwen_launch.sh --val-batches 4 --compare-samples 0 --log-interval 20 "$@"
}

answer() {
  local asked=(--data-dir "$WORK_DIR/shards/test" --split train --max-new-tokens "$NEW_TOKENS")
  say "evaluation"
  if [ ! -f "$run/evaluation/accuracy.json" ]; then
    "$PYTHON" evaluate_qwen2vl.py --model-dir "$run/hf" "${asked[@]}" --batch-size "$EVALUATION_BATCH" \
      --output-dir "$run/evaluation"
  fi
  "$PYTHON" -m benchmarks.quality.manuals.score "$variant=$run/evaluation" --data-dir "$WORK_DIR/shards/test" \
    --output "$run/scores.json"
  if [ "$format" = block ]; then return; fi  # it is a stock form
  say "stock form"
  "$PYTHON" evaluate_qwen2vl.py --compare "$run/hf_dct" "$run/hf" "${asked[@]}" --limit "$COMPARED" \
    --output-dir "$run/compared" > "$run/compared.txt" || { cat "$run/compared.txt"; exit 1; }
  tail -n 4 "$run/compared.txt"
  "$PYTHON" benchmarks/quality/manuals/stock_answers.py --model-dir "$run/hf" --data-dir "$WORK_DIR/shards/test" \
    --answers "$run/compared/comparison.jsonl" --max-new-tokens "$NEW_TOKENS"
}

for stage in $STAGES; do
  case $stage in
    shards) shards ;;
    convert) conversion ;;
    train) train "$@" ;;
    answer) answer ;;
    *) echo "run_variant.sh: STAGES are shards, convert, train and answer, not $stage" >&2; exit 2 ;;
  esac
done
say "done"
