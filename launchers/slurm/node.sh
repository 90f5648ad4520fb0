#!/usr/bin/env bash
# Launches one node's processes of a job; `srun` starts it once a node. Not to be called by hand.
#
#     PROCESSES=8 srun --ntasks-per-node=1 launchers/slurm/node.sh launchers/train.py --config ...
set -euo pipefail

# `srun --kill-on-bad-exit` loses what a task wrote just before it failed, which is the reason, unless it gets the time
# to pass it on: 31 of 40 messages of a task that ended at once were lost, none with a second in between.
trap '[ $? -eq 0 ] || sleep 2' EXIT
# Slurm's signals reach every process of the step. The ranks handle them; the launcher would die of them, or give the
# ranks 30 s, whatever KillWait is.
trap '' USR1 TERM
export PET_SIGNALS_TO_HANDLE=SIGINT

if [ "${SLURM_GPUS_ON_NODE:-$PROCESSES}" != "$PROCESSES" ]; then
    echo "error: $SLURMD_NODENAME has $SLURM_GPUS_ON_NODE GPUs of this job, the first node has $PROCESSES, expected the" \
        "same number on each node; ask with --gpus-per-node instead of --gpus" >&2
    exit 2
fi
if [ -z "${SLURM_GPUS_ON_NODE:-}" ]; then
    export ACCELERATE_USE_CPU=true
fi
nodes=$SLURM_STEP_NUM_NODES
master=$(scontrol show hostnames "$SLURM_STEP_NODELIST" | sed -n 1p)
# A requeued job keeps its number, and the port of its last start may not be free yet.
port=$((20000 + (10 * SLURM_JOB_ID + ${SLURM_RESTART_COUNT:-0}) % 12000))

accelerate launch --config_file launchers/accelerate/several_nodes.yaml \
    --num_machines "$nodes" --num_processes $((nodes * PROCESSES)) --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$master" --main_process_port "$port" "$@"
