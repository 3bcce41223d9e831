#!/usr/bin/env bash
# Runs qwen_launch.sh on the nodes of a Slurm job, one torchrun on each; every setting of qwen_launch.sh is taken from the environment.
#
#   MODEL_DIR=... DATASET_DIR=... sbatch --nodes 4 --gpus-per-node 8 slurm/train_slurm.sh --freeze vision
#
# Submit it from the repository's folder, or set REPOSITORY. The nodes must see the folders under the same names.
# CONTAINER=IMAGE runs it in that image (Slurm's pyxis plug-in), with MOUNTS=/datasets:/datasets,/models:/models.
# Requeued or submitted again, the job goes on from its newest checkpoint.
# It asks for the cores of 8 processes with 4 loader processes each; with others: sbatch --cpus-per-task N ...
# Tested with a stand-in for srun.
#SBATCH --job-name=qwen2vl
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=40
#SBATCH --requeue
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
REPOSITORY=${REPOSITORY:-${SLURM_SUBMIT_DIR:-$here}}  # Slurm runs a copy of this file from a folder of its own
NNODES=${SLURM_JOB_NUM_NODES:?train_slurm.sh runs inside a Slurm job: sbatch slurm/train_slurm.sh}
if [ ! -f "$REPOSITORY/qwen_launch.sh" ]; then
  echo "train_slurm.sh: no qwen_launch.sh in $REPOSITORY: submit the job from the repository's folder, or set REPOSITORY" >&2
  exit 1
fi
NUM_PROC_PER_NODE=${NUM_PROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}
if [ -z "${MASTER_ADDR:-}" ]; then
  hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
  MASTER_ADDR=${hosts%%$'\n'*}
fi
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
export REPOSITORY NNODES NUM_PROC_PER_NODE MASTER_ADDR MASTER_PORT
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
  export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun does not take it from the job (Slurm 22.05 on)
fi

container=()
if [ -n "${CONTAINER:-}" ]; then
  container=(--container-image="$CONTAINER" --container-mounts="${MOUNTS:+$MOUNTS,}$REPOSITORY:$REPOSITORY")
fi
# shellcheck disable=SC2016  # NODE_RANK is each node's own
exec srun "${container[@]}" --kill-on-bad-exit=1 \
  bash -c 'NODE_RANK=$SLURM_NODEID exec bash "$REPOSITORY/qwen_launch.sh" "$@"' qwen_launch.sh "$@"
