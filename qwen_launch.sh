#!/usr/bin/env bash
# Fine-tunes a converted Qwen2-VL on prepared shards: one process for each GPU, or for each CPU process where there is no GPU.
#
#   bash qwen_launch.sh                          inside the container, with the defaults below
#   MAX_STEPS=200 LR=2e-5 bash qwen_launch.sh    every name below can be set from the environment
#   bash qwen_launch.sh --freeze language        further arguments go to finetune_qwen2vl.py (see its --help)
#   bash qwen_launch.sh --export                 writes the model of the newest checkpoint, without training
#
# Started again after an interruption, the same command goes on from the newest checkpoint.
# Several nodes: the same command on each, with NNODES, NODE_RANK and MASTER_ADDR set; slurm/train_slurm.sh does that under Slurm.
# All of them must share MODEL_DIR, DATASET_DIR and OUTPUT_DIR under the same names.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ "$PWD" != "$here" ]; then
  for name in MODEL_DIR DATASET_DIR OUTPUT_DIR; do  # relative ones are named from the caller's folder
    case ${!name:-} in
      "" | /*) ;;
      *) declare "$name=$PWD/${!name}" ;;
    esac
  done
  cd "$here"
fi

EXPERIMENT_NAME=${EXPERIMENT_NAME:-qwen2vl_2b_dct_x4}
MODEL_DIR=${MODEL_DIR:-/models/Qwen2-VL-2B-Instruct-x4}    # from convert_checkpoint.py
DATASET_DIR=${DATASET_DIR:-/datasets/Cambrian737k-wds}     # from data_preparation.py and energon prepare
OUTPUT_DIR=${OUTPUT_DIR:-experiments}                      # results go to OUTPUT_DIR/EXPERIMENT_NAME

NUM_PROC_PER_NODE=${NUM_PROC_PER_NODE:-8}  # processes that torchrun starts on this node
DEVICES=${DEVICES:-$NUM_PROC_PER_NODE}     # devices of one node, one for each process
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
MASTER_PORT=${MASTER_PORT:-29500}

TP=${TP:-1}                      # tensor parallelism: processes that share each layer (megatron engine)
PP=${PP:-1}                      # pipeline parallelism: processes that share the layers (megatron engine)
PACK_TOKENS=${PACK_TOKENS:-}     # most tokens of a packed sequence, a micro-batch of the megatron engine; empty: what the device's memory holds
PACK_VISION_TOKENS=${PACK_VISION_TOKENS:-}  # most tokens of the vision tower in it; empty: twice PACK_TOKENS
MBS=${MBS:-}                     # micro-batch size: samples of one forward pass of one process, instead of packed sequences
GBS=${GBS:-}                     # global batch size: samples of one optimizer step (32), or packed sequences (of 131072 tokens together; 16 if PACK_TOKENS is given)
SEQ_LENGTH=${SEQ_LENGTH:-2048}   # tokens; longer samples are skipped and counted
MINPIXELS=${MINPIXELS:-}         # least pixels of an image; empty: what the checkpoint says
MAXPIXELS=${MAXPIXELS:-}         # most pixels of an image; empty: what the checkpoint says
SKIP_DB=${SKIP_DB:-}             # leaves out cells that a kept cell already shows with this PSNR, dB (38); empty: what the checkpoint says, usually none
SKIP_NOISE_FLOOR=${SKIP_NOISE_FLOOR:-}  # 1: with SKIP_DB, also cells that differ by no more than the noise of the video
SKIP_SHARE=${SKIP_SHARE:-}       # with SKIP_DB, the share of samples in which cells are left out; the others keep all; empty: 0.8, or what the run began with
MAX_STEPS=${MAX_STEPS:-5000}
LR=${LR:-1e-5}
MIN_LR=${MIN_LR:-1e-6}
WARMUP_STEPS=${WARMUP_STEPS:-150}
VAL_INTERVAL=${VAL_INTERVAL:-250}    # steps
SAVE_INTERVAL=${SAVE_INTERVAL:-250}  # steps
NUM_WORKERS=${NUM_WORKERS:-4}        # loader processes of one process
SEED=${SEED:-42}
ENGINE=${ENGINE:-auto}               # megatron, automodel, or auto
SHARDING=${SHARDING:-none}           # fsdp2: the processes share weights, gradients and optimizer (automodel engine)

if [ -z "${PYTHON:-}" ]; then
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON=python; fi
fi
refuse() {  # MESSAGE
  echo "qwen_launch.sh: $1" >&2
  exit 1
}
within() {  # NUMBER LEAST MOST
  case $1 in "" | *[!0-9]* | ??????*) return 1 ;; esac
  [ "$1" -ge "$2" ] && [ "$1" -le "$3" ]
}
within "$NUM_PROC_PER_NODE" 1 99999 ||
  refuse "NUM_PROC_PER_NODE=$NUM_PROC_PER_NODE: give the number of processes of this node, 1 or more"
[ "$DEVICES" = "$NUM_PROC_PER_NODE" ] ||
  refuse "DEVICES=$DEVICES, but NUM_PROC_PER_NODE=$NUM_PROC_PER_NODE: every process needs one device, make them equal"
within "$NNODES" 1 99999 || refuse "NNODES=$NNODES: give the number of nodes, 1 or more"
if [ "$NNODES" != 1 ]; then
  within "$NODE_RANK" 0 "$((NNODES - 1))" ||
    refuse "NODE_RANK=$NODE_RANK, but NNODES=$NNODES: number the nodes from 0 to $((NNODES - 1))"
  within "$MASTER_PORT" 1 65535 || refuse "MASTER_PORT=$MASTER_PORT: give a port from 1 to 65535"
fi
case $SKIP_NOISE_FLOOR in
  "" | 0 | 1) ;;
  *) refuse "SKIP_NOISE_FLOOR=$SKIP_NOISE_FLOOR: give 1, or leave it out" ;;
esac

arguments=(
  --model-dir "$MODEL_DIR" --data-dir "$DATASET_DIR" --output-dir "$OUTPUT_DIR" --experiment-name "$EXPERIMENT_NAME"
  --devices "$DEVICES" --num-nodes "$NNODES" --engine "$ENGINE" --sharding "$SHARDING"
  --tensor-parallel "$TP" --pipeline-parallel "$PP" --seq-length "$SEQ_LENGTH"
  --max-steps "$MAX_STEPS" --lr "$LR" --min-lr "$MIN_LR" --warmup-steps "$WARMUP_STEPS"
  --val-interval "$VAL_INTERVAL" --save-interval "$SAVE_INTERVAL" --num-workers "$NUM_WORKERS" --seed "$SEED"
)
if [ -n "$PACK_TOKENS" ]; then arguments+=(--pack-tokens "$PACK_TOKENS"); fi
if [ -n "$PACK_VISION_TOKENS" ]; then arguments+=(--pack-vision-tokens "$PACK_VISION_TOKENS"); fi
if [ -n "$MBS" ]; then arguments+=(--micro-batch-size "$MBS"); fi
if [ -n "$GBS" ]; then arguments+=(--global-batch-size "$GBS"); fi
if [ -n "$MINPIXELS" ]; then arguments+=(--min-pixels "$MINPIXELS"); fi
if [ -n "$MAXPIXELS" ]; then arguments+=(--max-pixels "$MAXPIXELS"); fi
if [ -n "$SKIP_DB" ]; then arguments+=(--skip-db "$SKIP_DB"); fi
if [ "$SKIP_NOISE_FLOOR" = 1 ]; then arguments+=(--skip-noise-floor); fi
if [ -n "$SKIP_SHARE" ]; then arguments+=(--skip-share "$SKIP_SHARE"); fi
arguments+=("$@")

# Packed sequences differ in length; without this the freed pieces of the device's memory do not fit the next one.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
# What torchrun would set with a banner of its own where it starts several processes.
if [ "$NUM_PROC_PER_NODE" != 1 ]; then export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}; fi
# NeMo requires it, and PyTorch warns of it in every process.
export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore:The pynvml package is deprecated:FutureWarning}

if [ "$NNODES" = 1 ]; then
  rendezvous=(--standalone)
else
  rendezvous=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
fi
exec "$PYTHON" -m dct_qwen2vl.training.launch "${rendezvous[@]}" --nproc-per-node "$NUM_PROC_PER_NODE" \
  finetune_qwen2vl.py "${arguments[@]}"
