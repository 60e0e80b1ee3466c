#!/usr/bin/env bash
#SBATCH --job-name=sogclr
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=sogclr_%j.log
# SogCLR under SLURM, on one machine or many, over any number of time slots:
#     sbatch [--nodes N ...] scripts/slurm.sh --data DIR --save_dir DIR2 [FLAGS of train.py]
# Needs: data and save folders that all machines see, and PYTHON=... (or python3) with the packages there.
# Two minutes before the time limit, and when preempted, the run saves and exits with 75; the job is then requeued and
# continues where it left off.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?is set by sbatch, start the script with that}"
trap : TERM USR1        # for the run, to which srun forwards them; this script survives to requeue the job

host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
url=tcp://$host:$((20000 + SLURM_JOB_ID % 20000))

# One process per machine, which starts one per GPU.
code=0
# shellcheck disable=SC2016 # each machine expands its own SLURM_NODEID
srun --kill-on-bad-exit=1 bash -c 'exec "${PYTHON:-python3}" train.py --multiprocessing-distributed \
    --world-size "$SLURM_NNODES" --rank "$SLURM_NODEID" "$@"' train.py \
    --dist-url "$url" --workers "${SLURM_CPUS_PER_TASK:-16}" --resume auto "$@" || code=$?

if [ "$code" = 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
