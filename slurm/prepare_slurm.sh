#!/usr/bin/env bash
# Prepares one data set on several nodes of a Slurm cluster: an array of PARTS tasks, of which each writes its share of the shards,
# then a job that waits for all of them and puts the counts together. The shards are those that one machine would write.
#
#   PARTS=8 bash slurm/prepare_slurm.sh --data-dir /datasets/Cambrian737k/Cambrian737k --output-dir /datasets/Cambrian737k-wds
#
# Further arguments go to data_preparation.py (see its --help). All nodes must see both folders. If tasks fail or are killed,
# the same command goes on; it writes only what is missing. sbatch itself is set by its own variables, like SBATCH_PARTITION.
# Tested with a stand-in for sbatch.
set -euo pipefail

PARTS=${PARTS:-4}        # tasks of the array
CPUS=${CPUS:-16}         # of a task, one worker process each
MEMORY=${MEMORY:-16G}    # of a task: 256 MB for each worker and 1 GB for the plan of a million entries
HOURS=${HOURS:-4}        # of a task at most
STEP=${STEP:-submit}     # submit, part or finish; the script gives the last two to the jobs it submits

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
REPOSITORY=${REPOSITORY:-$here}  # Slurm runs a copy of this file from a folder of its own
if [ -z "${PYTHON:-}" ]; then
  if [ -x "$REPOSITORY/.venv/bin/python" ]; then PYTHON=$REPOSITORY/.venv/bin/python; else PYTHON=python; fi
fi
prepare=("$PYTHON" "$REPOSITORY/data_preparation.py")

case $STEP in
  submit)
    export PARTS REPOSITORY PYTHON
    resources=(--cpus-per-task="$CPUS" --mem="$MEMORY" --time="$HOURS:00:00" --export=ALL --parsable)
    parts=$(STEP=part sbatch "${resources[@]}" --job-name=prepare --array="1-$PARTS" "$here/slurm/prepare_slurm.sh" "$@")
    after=(--dependency="afterok:${parts%%;*}" --kill-on-invalid-dep=yes)
    last=$(STEP=finish sbatch "${resources[@]}" --job-name=prepare-finish "${after[@]}" "$here/slurm/prepare_slurm.sh" "$@")
    echo "submitted: $PARTS parts as job ${parts%%;*}, then job ${last%%;*} puts the counts together"
    ;;
  part) exec "${prepare[@]}" "$@" --part "$SLURM_ARRAY_TASK_ID/$PARTS" ;;
  finish) exec "${prepare[@]}" "$@" ;;
  *)
    echo "prepare_slurm.sh: STEP=$STEP, but it is submit, part or finish" >&2
    exit 1
    ;;
esac
