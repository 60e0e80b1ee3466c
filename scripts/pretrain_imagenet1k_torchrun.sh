#!/usr/bin/env bash
# SogCLR on ImageNet-1K on several machines with torchrun, batch 1024, 800 epochs. Start it on each of them:
#     MEET=<name of one of them> NODES=4 GPUS=8 bash scripts/pretrain_imagenet1k_torchrun.sh
# Needs: NODES machines with GPUS GPUs each (default 4 x 8) that reach each other's TCP ports and see the same DATA and
# SAVE_DIR. They connect to MEET's port 29500; a second run there needs another RUN_ID. Without MEET it runs on a single
# machine. Under SLURM use slurm.sh.
# Hours: at best 7 on 32 A100, extrapolated as in pretrain_imagenet1k.sh; not measured.
# The authors report 69.4 linear top-1 at batch 1024 (read off the paper's figure); we have not measured it.
# Arguments are appended. If a process fails, torchrun restarts all up to 3 times, and they continue; if a machine is
# lost, start the same command on each again.
set -euo pipefail
cd "$(dirname "$0")/.."
# Otherwise torchrun passes leftovers of the last start, including dead addresses, to the next one.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
meeting=(--standalone --local-addr localhost)       # in containers the host name may have no address
if [ -n "${MEET:-}" ]; then
    meeting=(--nnodes "${NODES:-4}" --rdzv-backend c10d --rdzv-endpoint "$MEET:29500" --rdzv-id "${RUN_ID:-sogclr}")
fi
exec "${PYTHON:-python3}" -m torch.distributed.run "${meeting[@]}" --nproc-per-node "${GPUS:-8}" --max-restarts 3 \
    train.py --batch-size 1024 --epochs 800 --workers 64 --data_name imagenet1000 --data "${DATA:-data/imagenet1000}" \
    --save_dir "${SAVE_DIR:-saved_models}" --print-freq 100 --resume auto "$@"
