#!/usr/bin/env bash
# Submits stage 1, stage 2 and the evaluation of the test split as three jobs. Each starts when the previous one has
# succeeded. DeepSpeed needs this, because one launch can train only one stage.
#
#     launchers/slurm/both_stages.sh --nodes 8 --gpus-per-node 8 --cpus-per-task 64 --time 4:00:00 -- \
#         --config launchers/configs/coco.yaml --deepspeed ds_configs/zero2.json
#
# Put options of sbatch before `--` and training settings after it. Prints the IDs of the three jobs.
set -euo pipefail

options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    options+=("$1")
    shift
done
if [ $# -eq 0 ]; then
    echo "error: no -- on the command line, expected [SBATCH OPTIONS] -- [TRAINING SETTINGS]" >&2
    exit 2
fi
shift

out=$(python launchers/train.py "$@" --print_config | python -c 'import sys, yaml; print(yaml.safe_load(sys.stdin)["out"])')
# Without the second option a job would stay pending forever if its predecessor failed.
after() { echo "--dependency=afterok:$1" --kill-on-invalid-dep=yes; }
submit() { sbatch --parsable "${options[@]}" "$@" | cut -d ';' -f 1; }

stage1=$(submit launchers/slurm/train.sbatch "$@" --stages '[1]')
# shellcheck disable=SC2046  # two options
stage2=$(submit $(after "$stage1") launchers/slurm/train.sbatch "$@" --stages '[2]' \
    --init "$out/stage1/adapter.safetensors")
# shellcheck disable=SC2046
evaluation=$(submit $(after "$stage2") launchers/slurm/evaluate.sbatch --config "$out/config.yaml" --split test \
    --out "$out/results.json" --adapters "action-aware=$out/stage2/adapter.safetensors")
echo "$stage1 $stage2 $evaluation"
