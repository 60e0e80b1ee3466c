#!/usr/bin/env bash
# Which settings? From a starting point one setting at a time is changed, for SimCLR and SogCLR alike, at batch 64 on
# 5,000 training images of CIFAR-10, and judged on 5,000 other *training* images (cached features, and kNN): no test
# image is looked at. What came of it stands in the README and in cifar10_batch_size_cpu.sh.
# Needs: no GPU, but about 5 minutes a run on one core; JOBS=2 uses two. DATA takes CIFAR-10 (DATA_NAME=folder: as
# DATA/train/<class>/); OUT takes the runs and results.md; SEEDS, BATCHES, SUBSET and LINCLS are as in
# cifar10_batch_size.sh. Arguments change the starting point. The same command continues where it was cut off. At full
# size on a GPU, not measured:
#   SUBSET="--train 40000 --val 10000" JOBS=4 LINCLS="--workers 4" OUT=saved_models/cifar10_search_full \
#       bash scripts/cifar10_search.sh --stem cifar --epochs 100 --warmup-epochs 10 --workers 4
set -euo pipefail
cd "$(dirname "$0")/.."
export CALLERS=cifar10_search.sh
export OUT=${OUT:-saved_models/cifar10_search} SUBSET="--held-out ${SUBSET:---train 5000 --val 5000}"
export SEEDS=${SEEDS:-1} BATCHES=${BATCHES:-64} PROTOCOLS="cached knn" LINCLS="--workers 1 --precision bf16 ${LINCLS:-}"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} VARIANTS="
--t 0.1
--t 0.4
--lr 0.3
--lr 0.075
--lr 0.0375
--t 0.1 --lr 0.075
--t 0.07 --lr 0.075
--t 0.05 --lr 0.075
--crop-min 0.08
--wd 1e-4
--gamma 0.5
--gamma 0.2"
exec bash scripts/cifar10_batch_size.sh --stem imagenet --workers 1 --precision bf16 --epochs 10 --warmup-epochs 1 \
    --learning-rate-scaling sqrt --lr 0.15 --t 0.2 --gamma 0.9 --crop-min 0.2 --wd 1e-6 "$@"
