#!/bin/bash
#SBATCH --job-name=second-order
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=01:00:00
#SBATCH --open-mode=append
#
# SOO_CONFIG=soo.yaml sbatch recipes/launch/slurm.sh train.py --its --own arguments
#
# One launcher on each node, which starts the processes of that node. What --nodes says takes precedence over the
# configuration's numbers of machines and processes.
set -euo pipefail

: "${SOO_CONFIG:?set SOO_CONFIG to the configuration of the method, such as soo.yaml}"
if [ $# -eq 0 ]; then
    echo "usage: SOO_CONFIG=soo.yaml sbatch $0 train.py --its --own arguments" >&2
    exit 2
fi

# a copy of this script runs, so paths are relative to where sbatch was called
export LAUNCH_CONFIG="${LAUNCH_CONFIG:-recipes/launch/fsdp2.yaml}"
export PROCESSES="$((SLURM_NNODES * ${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}))"
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MAIN_PROCESS_IP="${nodes[0]:?scontrol names no node of $SLURM_JOB_NODELIST}"
export MAIN_PROCESS_PORT="${MAIN_PROCESS_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"

# SLURM_NODEID is each node's own
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c '
    exec accelerate launch --config_file "$LAUNCH_CONFIG" \
        --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" --num_processes "$PROCESSES" \
        --main_process_ip "$MAIN_PROCESS_IP" --main_process_port "$MAIN_PROCESS_PORT" --rdzv_backend static \
        -m lightning_soo.launch "$@"
' launcher "$@"
