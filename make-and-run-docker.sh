#!/usr/bin/env bash
# Builds the container of the Dockerfile if this version of it is not there yet, and runs a command in it.
#
#   MODEL_DIR=~/models DATASET_DIR=~/datasets ./make-and-run-docker.sh                    a shell
#   MODEL_DIR=~/models DATASET_DIR=~/datasets ./make-and-run-docker.sh ./qwen_launch.sh   a command and its arguments
#
# The settings of qwen_launch.sh that are set here hold in the container, too, but for MODEL_DIR and DATASET_DIR:
#   ... LR=2e-5 EXPERIMENT_NAME=first ./make-and-run-docker.sh env MODEL_DIR=/models/other-x4 bash qwen_launch.sh
#
# In the container /models and /datasets are those two folders, and the working folder is this repository; you are the
# same user as outside. Needs an NVIDIA GPU, Docker and the NVIDIA Container Toolkit. The first build pulls
# nvcr.io/nvidia/nemo:25.07, tens of GB.
#
#   GPUS=all|0|0,1|none   the GPUs the container sees (default: all)
#   SHM_SIZE=16g          own shared memory of this size, instead of the host's (default: the host's)
#   NNODES=4              several nodes: the container uses the host's network, and InfiniBand if the host has it
set -euo pipefail

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
readonly REPOSITORY
readonly GPUS=${GPUS:-all} SHM_SIZE=${SHM_SIZE:-}

fail() {
    printf 'make-and-run-docker.sh: %s\n' "$*" >&2
    exit 1
}

folder() { # VARIABLE MEANING -> the absolute path in it
    local path=${!1:-}
    [[ -n $path ]] || fail "$1 is not set; it names $2. Example: $1=/data/${1,,} ./make-and-run-docker.sh"
    [[ -d $path ]] || fail "$1=$path is not a folder; it names $2. Create it, or point $1 elsewhere"
    (cd "$path" && pwd -P)
}

bind_mount() { # SOURCE TARGET; in the value of --mount commas separate fields
    [[ $1 != *,* ]] || fail "docker cannot mount $1, because of the comma; rename that folder"
    OPTIONS+=(--mount "type=bind,source=$1,target=$2")
}

# Names of the launcher's settings. MODEL_DIR and DATASET_DIR mean the mounted folders here, and a checkpoint and a set there.
launcher_settings() {
    sed -nE 's/^([A-Z_]+)=\$\{\1:-.*/\1/p' "$REPOSITORY/qwen_launch.sh" | grep -vxE 'MODEL_DIR|DATASET_DIR'
}

build_arguments() {
    printf '%s\n' "UID=$(id -u)" "GID=$(id -g)" "USER_NAME=$(id -un)"
}

# The same Dockerfile and user give the same tag, so an image is built once.
image_tag() {
    local hash
    hash=$({ build_arguments && cat "$REPOSITORY/Dockerfile"; } | sha256sum)
    printf 'dct-qwen2vl:%s' "${hash:0:16}"
}

build_unless_there() { # TAG
    local argument arguments=()
    if docker image inspect "$1" >/dev/null 2>&1; then return; fi
    while IFS= read -r argument; do arguments+=(--build-arg "$argument"); done < <(build_arguments)
    docker build "${arguments[@]}" --tag "$1" "$REPOSITORY" ||
        fail "docker build failed, see above; then run the same command again (finished steps are kept)"
}

# Options by group: user's terminal, GPUs, memory as NVIDIA's release notes recommend for PyTorch, network of several
# nodes, environment, mounts.
run_options() {
    local models datasets name
    models=$(folder MODEL_DIR "the folder of the checkpoints")
    datasets=$(folder DATASET_DIR "the folder of the data sets")
    OPTIONS=(--rm --interactive)
    if [[ -t 0 && -t 1 ]]; then OPTIONS+=(--tty); fi
    case $GPUS in
        none) ;;
        all) OPTIONS+=(--gpus all) ;;
        *) OPTIONS+=(--gpus "\"device=$GPUS\"") ;; # docker wants the quotes, to keep the commas in one field
    esac
    if [[ -n $SHM_SIZE ]]; then OPTIONS+=(--shm-size "$SHM_SIZE"); else OPTIONS+=(--ipc host); fi
    OPTIONS+=(--ulimit memlock=-1 --ulimit stack=67108864)
    if [[ ${NNODES:-1} != 1 ]]; then # the other nodes reach this one, and NCCL finds its network cards
        OPTIONS+=(--network host)
        if [[ -d /dev/infiniband ]]; then OPTIONS+=(--device /dev/infiniband); fi
    fi
    OPTIONS+=(--env HF_HUB_OFFLINE --env WANDB_API_KEY --env WANDB_MODE)
    for name in $(launcher_settings); do
        if [[ -n ${!name+set} ]]; then OPTIONS+=(--env "$name"); fi
    done
    bind_mount "$models" /models
    bind_mount "$datasets" /datasets
    bind_mount "$REPOSITORY" /workspace/repository
    OPTIONS+=(--workdir /workspace/repository)
}

main() {
    local tag
    case ${1:-} in
        -h | --help) exec sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" ;;
    esac
    command -v docker >/dev/null ||
        fail "docker is not on PATH; install Docker and the NVIDIA Container Toolkit, or try the demo without: make demo"
    run_options
    tag=$(image_tag)
    build_unless_there "$tag"
    exec docker run "${OPTIONS[@]}" "$tag" "$@"
}

main "$@"
