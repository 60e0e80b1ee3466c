#!/usr/bin/env bash
# SogCLR on your own images, without labels: DATA=folder, at any depth (or its subfolder train/), ResNet-50, 200 epochs.
# Needs: 1 GPU or more, and tens of thousands of images; fewer need more --epochs and a smaller --batch-size.
# Hours: --dry-run estimates yours. Accuracy depends on the images; --knn-freq 10 reports it, if they have classes.
# Unreadable images are replaced and reported; more than 1 % of them stop it. Arguments are appended, so any flag can be
# overridden. The same command continues an interrupted run.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" train.py --data_name folder --data "${DATA:?DATA=folder of your images}" --bad-images skip \
    --epochs 200 --batch-size 256 --workers 32 --save_dir "${SAVE_DIR:-saved_models}" --print-freq 100 --resume auto "$@"
