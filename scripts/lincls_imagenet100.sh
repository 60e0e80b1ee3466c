#!/usr/bin/env bash
# Linear evaluation on ImageNet-100, 90 epochs.
# Needs: GPUs, DATA=folder made by scripts/tools/make_imagenet100.py, and the checkpoint as first argument.
# The authors report 80.0 for 400 epochs of pretraining at batch 256; we have not measured it.
# Hours: not measured. Further arguments are appended, so any flag can be overridden.
set -euo pipefail
pretrained=$(realpath "${1:?usage: $0 CHECKPOINT [FLAGS]}")
shift
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" lincls.py --workers 32 --pretrained "$pretrained" --data_name imagenet100 \
    --data "${DATA:-data/imagenet100}" --save_dir "${SAVE_DIR:-saved_models}" --resume auto "$@"
