#!/usr/bin/env bash
# Launches the processes of one node. `srun` runs it once per node; don't call it by hand.
#
#     PROCESSES=8 srun --ntasks-per-node=1 launchers/slurm/node.sh launchers/train.py --config ...
set -euo pipefail

# `srun --kill-on-bad-exit` loses the last output of a failing task, which is its error message, unless the task waits
# before it exits: without a wait 31 of 40 messages were lost, with a wait of one second none.
trap '[ $? -eq 0 ] || sleep 2' EXIT
# Slurm's signals reach every process of the step. The ranks handle them. The launcher must ignore them: it would die, or
# stop the ranks after 30 s, regardless of KillWait.
trap '' USR1 TERM
export PET_SIGNALS_TO_HANDLE=SIGINT

if [ "${SLURM_GPUS_ON_NODE:-$PROCESSES}" != "$PROCESSES" ]; then
    echo "error: $SLURMD_NODENAME has $SLURM_GPUS_ON_NODE GPUs of this job, the first node has $PROCESSES, expected the" \
        "same number on each node; request GPUs with --gpus-per-node instead of --gpus" >&2
    exit 2
fi
if [ -z "${SLURM_GPUS_ON_NODE:-}" ]; then
    export ACCELERATE_USE_CPU=true
fi
nodes=$SLURM_STEP_NUM_NODES
master=$(scontrol show hostnames "$SLURM_STEP_NODELIST" | sed -n 1p)
# A requeued job keeps its ID, and the port of its last start may not be free yet.
port=$((20000 + (10 * SLURM_JOB_ID + ${SLURM_RESTART_COUNT:-0}) % 12000))

accelerate launch --config_file launchers/accelerate/several_nodes.yaml \
    --num_machines "$nodes" --num_processes $((nodes * PROCESSES)) --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$master" --main_process_port "$port" "$@"
