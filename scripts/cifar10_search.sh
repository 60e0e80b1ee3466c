#!/usr/bin/env bash
# Which settings? From a starting point one setting at a time is changed, for SimCLR and SogCLR alike, at batch 64 on
# 5,000 training images of CIFAR-10, and judged on 5,000 other *training* images (cached features, and kNN): no test
# image is looked at. What came of it stands in the README and in cifar10_batch_size_cpu.sh.
# Needs: no GPU, but 4 minutes a run on one core. LOSSES=cl and LOSSES=dcl in two shells use two cores, once the first
# has made the images. DATA takes CIFAR-10 (DATA_NAME=folder: as DATA/train/<class>/); OUT takes the runs and
# results.md. The same command continues where it was cut off.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-saved_models/cifar10_search}
images=$out/cifar10_5000_held_out
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

mkdir -p "$out"
[ -d "$images" ] || "$python" scripts/make_subset.py "$images" --held-out --data_name "${DATA_NAME:-cifar10}" \
    --data "${DATA:-data/cifar10}"

try() {     # NAME LOSSES [FLAGS that differ from the starting point]
    echo "=> $1"
    OUT=$out/$1 DATA_NAME=folder DATA=$images SEEDS=1 BATCHES=64 LOSSES=$2 PROTOCOLS="cached knn" \
        LINCLS="--workers 1 --precision bf16" bash scripts/cifar10_batch_size.sh --stem imagenet --workers 1 \
        --precision bf16 --epochs 10 --warmup-epochs 1 --learning-rate-scaling sqrt \
        --lr 0.15 --t 0.2 --gamma 0.9 --crop-min 0.2 --wd 1e-6 "${@:3}" > "$out/$1.log"
}

for loss in ${LOSSES:-cl dcl}; do
    try "start_$loss" "$loss"
    for change in "t 0.1" "t 0.4" "lr 0.3" "lr 0.075" "crop-min 0.08" "wd 1e-4"; do
        try "${change// /_}_$loss" "$loss" --"${change% *}" "${change#* }"
    done
done
case ${LOSSES:-dcl} in *dcl*)
    for gamma in 0.5 0.2; do
        try "gamma_${gamma}_dcl" dcl --gamma "$gamma"
    done
esac
"$python" scripts/collect_results.py "$out" | tee "$out/results.md"
