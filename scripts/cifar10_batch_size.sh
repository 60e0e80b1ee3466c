#!/usr/bin/env bash
# A small batch does not harm: SimCLR (cl) and SogCLR (dcl) on CIFAR-10 at several batch sizes, everything else the same,
# with a ResNet-18; then linear evaluation, classic and of cached features, at eight rates each, and kNN; a table and a
# plot of all. In the environment:
#   LOSSES="cl dcl" BATCHES="32 64 128 256 512" SEEDS="1 2 3" PROTOCOLS="classic cached knn"   what to do: all, or a part
#   DATA_NAME=cifar10 DATA=DIR OUT=DIR    the images, as in train.py; and where runs, results.md and results.png go
#   SUBSET              flags of make_subset.py, for a part of the images: "--train 5000", or "--held-out" to choose settings
#   LINCLS, CLASSIC     further flags for lincls.py, and for its classic protocol alone
#   VARIANTS            each line holds flags of train.py, for a further set of runs with them, beside that without; those
#                       with --gamma are SogCLR's alone. Where OUT holds any of them there is no plot
#   JOBS=4              trains four at a time, each with its log in OUT, where one alone leaves the device idle
# Needs: 1 GPU for all of it, on which it is not measured; the CPU-sized version is cifar10_batch_size_cpu.sh.
# Arguments are appended to train.py's, so its other flags can be overridden; other settings want another OUT. The same
# command continues where it was cut off.
set -euo pipefail
cd "$(dirname "$0")/.."
for flag in "$@" ${VARIANTS:-}; do
    case $flag in -h | --help)      # the head of the script that was called, then of what it calls
        for script in ${CALLERS:-} cifar10_batch_size.sh; do
            echo "scripts/$script"
            sed -n '1d; /^set /q; s/^#/   /p' "scripts/$script"
        done
        exit ;;
    esac
    case $flag in --arch* | -a | --image-size* | --batch-size* | -b | --seed* | --loss_type* | --save_dir* | --data*)
        echo "$0: error: $flag: is the script's own, see its head for LOSSES, BATCHES, SEEDS, OUT and DATA" >&2
        exit 2 ;;
    esac
done
protocols=${PROTOCOLS:-classic cached knn}
for protocol in $protocols; do
    case $protocol in classic | cached | knn) ;; *)
        echo "$0: error: PROTOCOLS: knows classic, cached and knn, not $protocol" >&2
        exit 2 ;;
    esac
done
python=${PYTHON:-python3}
out=${OUT:-saved_models/cifar10_batch_size}
jobs=${JOBS:-1}
case $jobs in [1-9] | [1-9][0-9]) ;; *) echo "$0: error: JOBS=$jobs: must be a whole number, 1 to 99" >&2; exit 2 ;; esac
variants=("")
while read -ra flags; do
    [ ${#flags[@]} = 0 ] || variants+=("${flags[*]}")
done <<< "${VARIANTS:-}"
read -ra lincls <<< "${LINCLS:-}"
read -ra classic <<< "${CLASSIC:-}"
read -ra subset <<< "${SUBSET:-}"
data_name=${DATA_NAME:-cifar10} data=${DATA:-data/cifar10}
rates=(0.001 0.003 0.01 0.03 0.1 0.3 1 3)

# Pretraining and evaluation: FOLDER LOSS BATCH SEED [flags of train.py]
one_run() {
    local runs=$1 loss=$2 batch=$3 seed=$4
    local all="$* | $protocols | ${LINCLS:-} | ${CLASSIC:-} | $data_name | $data"
    if [ "$(cat "$runs/finished" 2> /dev/null)" = "$all" ]; then
        echo "=> $runs: is finished"
        return
    fi
    local common=(--data_name "$data_name" --data "$data" --image-size 32 --arch resnet18
                  --seed "$seed" --workers "$((jobs < 16 ? 16 / jobs : 1))" --save_dir "$runs" --resume auto
                  --print-freq 100)
    "$python" train.py "${common[@]}" --loss_type "$loss" --batch-size "$batch" --epochs 200 --lr 1.0 \
        --learning-rate-scaling linear --wd 1e-4 --t 0.3 --gamma 0.9 --save-freq 1000 "${@:5}"
    local checkpoint=("$runs"/*_bz_"$batch"_*/checkpoint_last.pth.tar)
    if [ ${#checkpoint[@]} != 1 ]; then
        echo "$0: error: $runs: holds runs with other settings too, name another OUT" >&2
        exit 2
    fi
    local protocol evaluate=("$python" lincls.py "${common[@]}" --pretrained "${checkpoint[0]}" "${lincls[@]}")
    for protocol in $protocols; do
        case $protocol in
            classic) "${evaluate[@]}" --lr "${rates[@]}" "${classic[@]}" ;;
            cached) "${evaluate[@]}" --lr "${rates[@]}" --features cached ;;
            knn) "${evaluate[@]}" --knn ;;
        esac
    done
    echo "$all" > "$runs/finished"
}

# Waits until fewer than $1 runs are left. Where one has failed, and at Ctrl-C, which the runs hear themselves, the script
# starts no more and ends with that code when those beside it have ended.
running=0
leave_fewer_than() {
    local code=0
    while [ "$code" = 0 ] && [ "$running" -ge "$1" ]; do
        wait -n || code=$?
        running=$((running - 1))
    done
    if [ "$code" != 0 ]; then
        echo "$0: stops with code $code when the runs that have begun have ended, see $out/*.log" >&2
        wait
        exit "$code"
    fi
}

mkdir -p "$out"
if [ ${#subset[@]} != 0 ]; then
    images=${SUBSET//--/}
    images=$out/images_${images//[ \/]/_}
    [ -d "$images" ] || "$python" scripts/make_subset.py "$images" --data_name "$data_name" --data "$data" "${subset[@]}"
    data_name=folder data=$images
fi
for seed in ${SEEDS:-1 2 3}; do
    for variant in "${variants[@]}"; do
        for batch in ${BATCHES:-32 64 128 256 512}; do
            for loss in ${LOSSES:-cl dcl}; do
                case $loss$variant in cl*--gamma*) continue ;; esac         # SimCLR has none
                read -ra flags <<< "$variant"
                runs=$out/${loss}_${batch}_$seed${variant:+_${variant//[ \/]/_}}
                if [ "$jobs" = 1 ]; then
                    one_run "$runs" "$loss" "$batch" "$seed" "$@" "${flags[@]}"
                else
                    leave_fewer_than "$jobs"
                    echo "=> $runs.log"
                    trap ':' INT        # so that the script waits for them, which get it too
                    one_run "$runs" "$loss" "$batch" "$seed" "$@" "${flags[@]}" >> "$runs.log" 2>&1 &
                    running=$((running + 1))
                fi
            done
        done
    done
done
leave_fewer_than 1
plot=(--png "$out/results.png")
if compgen -G "$out/*_--*" > /dev/null; then    # runs of VARIANTS, which one plot cannot show
    plot=()
fi
"$python" scripts/collect_results.py "$out" "${plot[@]}" | tee "$out/results.md"
