#!/usr/bin/env bash
# A small batch does not harm: SimCLR (cl) and SogCLR (dcl) on CIFAR-10 at several batch sizes, everything else the same;
# then linear evaluation, classic and of cached features, at eight rates each, and kNN; a table and a plot of all.
# Needs: 1 GPU for all of it. LOSSES, BATCHES, SEEDS and PROTOCOLS choose a part; LINCLS holds further flags for
# lincls.py, CLASSIC those for its classic protocol alone; OUT takes the runs, results.md and results.png. Not measured on
# a GPU: the CPU-sized version is cifar10_batch_size_cpu.sh.
# Arguments are appended to train.py's, so its other flags can be overridden; other settings want another OUT. The same
# command continues where it was cut off.
set -euo pipefail
cd "$(dirname "$0")/.."
for flag in "$@"; do
    case $flag in --arch* | -a | --image-size* | --batch-size* | -b | --seed* | --loss_type* | --save_dir* | --data*)
        echo "$0: error: $flag: is the script's own, see its head for LOSSES, BATCHES, SEEDS, OUT and DATA" >&2
        exit 2 ;;
    esac
done
python=${PYTHON:-python3}
out=${OUT:-saved_models/cifar10_batch_size}
read -ra lincls <<< "${LINCLS:-}"
read -ra classic <<< "${CLASSIC:-}"
rates=(0.001 0.003 0.01 0.03 0.1 0.3 1 3)

for seed in ${SEEDS:-1 2 3}; do
    for batch in ${BATCHES:-32 64 128 256 512}; do
        for loss in ${LOSSES:-cl dcl}; do
            runs=$out/${loss}_${batch}_$seed
            common=(--data_name "${DATA_NAME:-cifar10}" --data "${DATA:-data/cifar10}" --image-size 32 --arch resnet18
                    --seed "$seed" --workers 16 --save_dir "$runs" --resume auto --print-freq 100)
            "$python" train.py "${common[@]}" --loss_type "$loss" --batch-size "$batch" --epochs 200 --lr 1.0 \
                --learning-rate-scaling linear --wd 1e-4 --t 0.3 --gamma 0.9 --save-freq 1000 "$@"
            checkpoint=("$runs"/*_bz_"$batch"_*/checkpoint_last.pth.tar)
            if [ ${#checkpoint[@]} != 1 ]; then
                echo "$0: error: $runs: holds runs with other settings too, name another OUT" >&2
                exit 2
            fi
            evaluate=("$python" lincls.py "${common[@]}" --pretrained "${checkpoint[0]}" "${lincls[@]}")
            for protocol in ${PROTOCOLS:-classic cached knn}; do
                case $protocol in
                    classic) "${evaluate[@]}" --lr "${rates[@]}" "${classic[@]}" ;;
                    cached) "${evaluate[@]}" --lr "${rates[@]}" --features cached ;;
                    knn) "${evaluate[@]}" --knn ;;
                    *) echo "PROTOCOLS: knows classic, cached and knn, not $protocol" >&2; exit 2 ;;
                esac
            done
        done
    done
done
"$python" scripts/collect_results.py "$out" --png "$out/results.png" | tee "$out/results.md"
