#!/usr/bin/env bash
# Linear evaluation on ImageNet-1K, 90 epochs: the authors' command, on a free port instead of theirs.
# Needs: GPUs, DATA=folder with train/ and val/ (default data/imagenet1000), and the checkpoint as first argument.
# The authors report 69.0 (68.4 in their first README) for 800 epochs of pretraining at batch 256; we have not measured it.
# Hours: not measured. Further arguments are appended, so any flag can be overridden.
set -euo pipefail
pretrained=$(realpath "${1:?usage: $0 CHECKPOINT [FLAGS]}")
shift
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" lincls.py --multiprocessing-distributed --world-size 1 --rank 0 \
    --workers 32 --pretrained "$pretrained" --data_name imagenet1000 --data "${DATA:-data/imagenet1000}" \
    --save_dir "${SAVE_DIR:-saved_models}" --resume auto "$@"
