#!/usr/bin/env bash
# A small batch does not harm, at a size for a CPU: cifar10_batch_size.sh on 5,000 training and 5,000 test images of
# CIFAR-10, with ImageNet's stem (a fifteenth of the cifar stem's work), 12 epochs, and the settings that
# cifar10_search.sh chose on held-out training images. The table and the plot in the README are its.
# Needs: no GPU, but on one core (of two, with such a run on the other) 12 minutes a run at batch 16, 6 at batch 64, 5 at
# batch 256, and 3 for its evaluation: 1.5 hours with JOBS=2 on two cores.
# DATA takes CIFAR-10 (DATA_NAME=folder: as DATA/train/<class>/ and DATA/val/<class>/); OUT, LOSSES, BATCHES, SEEDS,
# PROTOCOLS, VARIANTS, SUBSET and JOBS are as there. Arguments are appended to train.py's. The same command continues
# where it was cut off.
set -euo pipefail
cd "$(dirname "$0")/.."
export CALLERS="${CALLERS:-} cifar10_batch_size_cpu.sh"
export OUT=${OUT:-saved_models/cifar10_batch_size_cpu} SUBSET=${SUBSET:---train 5000 --val 5000}
export BATCHES=${BATCHES:-16 64 256} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export LINCLS="--workers 1 --precision bf16 ${LINCLS:-}" CLASSIC=${CLASSIC:---batch-size 256 --epochs 10}
exec bash scripts/cifar10_batch_size.sh --stem imagenet --workers 1 --precision bf16 --epochs 12 --warmup-epochs 1 \
    --learning-rate-scaling sqrt --lr 0.075 --t 0.1 --gamma 0.9 --crop-min 0.2 --wd 1e-6 "$@"
