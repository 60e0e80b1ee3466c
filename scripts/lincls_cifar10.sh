#!/usr/bin/env bash
# Linear evaluation on CIFAR-10, 90 epochs.
# Needs: 1 GPU, and the checkpoint as first argument. The authors report 91.78; we have not measured it.
# Hours: not measured. Further arguments are appended, so any flag can be overridden.
set -euo pipefail
pretrained=$(realpath "${1:?usage: $0 CHECKPOINT [FLAGS]}")
shift
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" lincls.py --data_name cifar10 --data "${DATA:-data/cifar10}" \
    --pretrained "$pretrained" --workers 16 --save_dir "${SAVE_DIR:-saved_models}" --resume auto "$@"
