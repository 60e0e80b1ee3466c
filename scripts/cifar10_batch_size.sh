#!/usr/bin/env bash
# A small batch does not harm: SimCLR (cl) and SogCLR (dcl) on CIFAR-10 at several batch sizes, everything else the same,
# with a ResNet-18; then linear evaluation, classic and of cached features, at eight rates each, and kNN; a table and a
# plot of all. In the environment:
#   LOSSES="cl dcl" BATCHES="32 64 128 256 512" SEEDS="1 2 3" PROTOCOLS="classic cached knn"   what to do: all, or a part
#   DATA_NAME=cifar10 DATA=DIR OUT=DIR    the images, as in train.py; and where runs, results.md and results.png go
#   SUBSET              flags of make_subset.py, for a part of the images: "--train 2000 --val 1000", with "--held-out" to
#                       choose settings; what is not said is 5000
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
    case $flag in --arch* | -a* | --image-size* | --batch-size* | -b* | --seed* | --loss_type* | --save_dir* | --data*)
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
read -ra lincls <<< "${LINCLS:-}"
read -ra classic <<< "${CLASSIC:-}"
read -ra subset <<< "${SUBSET:-}"
data_name=${DATA_NAME:-cifar10} data=${DATA:-data/cifar10} arguments=("$@")
rates=(0.001 0.003 0.01 0.03 0.1 0.3 1 3)

# A part of the images, which says what it is a part of.
if [ ${#subset[@]} != 0 ]; then
    images=${subset[*]//--/}
    images=$out/images_${images//[ \/]/_}
    [ "$data_name" = folder ] && whole=$(realpath -m "$data") || whole=$data_name
    if [ -e "$images/made_from" ] && [ "$(cat "$images/made_from")" != "$whole" ]; then
        echo "$0: error: $images: was made from $(cat "$images/made_from"), not from $whole, name another OUT" >&2
        exit 2
    fi
    subset+=(--data_name "$data_name" --data "$data")
    data_name=folder data=$images
fi

# The runs, each once: its folder, loss, batch size, seed, and flags of its own.
runs=() losses=() batches=() seeds=() variants=()
declare -A planned
for seed in ${SEEDS:-1 2 3}; do
    while read -ra flags; do
        for batch in ${BATCHES:-32 64 128 256 512}; do
            for loss in ${LOSSES:-cl dcl}; do
                variant=${flags[*]}
                case $loss$variant in cl*--gamma*) continue ;; esac         # SimCLR has none
                folder=$out/${loss}_${batch}_$seed${variant:+_${variant//[ \/]/_}}
                [ -z "${planned[$folder]:-}" ] || continue
                planned[$folder]=yes
                runs+=("$folder") losses+=("$loss") batches+=("$batch") seeds+=("$seed") variants+=("$variant")
            done
        done
    done <<< $'\n'"${VARIANTS:-}"       # a first line without flags
done

# Of run $1: `common`, what train.py and lincls.py get alike, and `pretrain`, all that train.py gets.
set_flags() {
    read -ra flags <<< "${variants[$1]}"
    common=(--data_name "$data_name" --data "$data" --image-size 32 --arch resnet18 --seed "${seeds[$1]}"
            --workers "$((jobs < 16 ? 16 / jobs : 1))" --save_dir "${runs[$1]}" --resume auto --print-freq 100)
    pretrain=("${common[@]}" --loss_type "${losses[$1]}" --batch-size "${batches[$1]}" --epochs 200 --lr 1.0
              --learning-rate-scaling linear --wd 1e-4 --t 0.3 --gamma 0.9 --save-freq 1000
              "${arguments[@]}" "${flags[@]}")
}

# What train.py will name each run's folder. So before anything is made all flags are known to train.py and lincls.py,
# no folder holds a run with other settings, and what has the same settings, as where an argument is a variant's too, is
# done in one of their folders, the `home` of that name.
names=$(for i in "${!runs[@]}"; do
    set_flags "$i"
    printf '%s\0' "${pretrain[@]}" $'\n'
done | "$python" -c '
import os, sys
sys.argv[0] = "lincls.py"       # which speaks of a wrong flag
from lincls import PARSER
PARSER.parse_args(sys.argv[1:])
sys.argv[0] = "train.py"
from train import PARSER, run_name
for call in os.fsdecode(sys.stdin.buffer.read()).split("\n\0")[:-1]:
    print(run_name(PARSER.parse_args(call.split("\0")[:-1])))' "${lincls[@]}" "${classic[@]}")
mapfile -t names <<< "$names"
if [ ${#names[@]} != ${#runs[@]} ]; then
    echo "$0: error: $python tells ${#names[@]} names of ${#runs[@]} runs; is --help in LINCLS or CLASSIC?" >&2
    exit 2
fi
declare -A home
for i in "${!runs[@]}"; do
    for other in "${runs[i]}"/*_bz_*/checkpoint_last.pth.tar; do
        if [ -e "$other" ] && [ "$other" != "${runs[i]}/${names[i]}/checkpoint_last.pth.tar" ]; then
            echo "$0: error: ${runs[i]}: holds a run with other settings, name another OUT" >&2
            exit 2
        fi
    done
    for folder in "${runs[i]}" "$out"/*; do         # also that of a former call
        [ ! -d "$folder/${names[i]}" ] || : "${home[${names[i]}]:=$folder}"
    done
    : "${home[${names[i]}]:=${runs[i]}}"
done

# Pretraining and evaluation. The mark of a finished run tells what its folder does not.
one_run() {
    set_flags "$1"
    local folder=${runs[$1]} protocol
    local mark="${arguments[*]} | $protocols | ${LINCLS:-} | ${CLASSIC:-} | $data_name | $data"
    if [ "$(cat "$folder/finished" 2> /dev/null)" = "$mark" ]; then
        echo "=> $folder: is finished"
        return
    fi
    "$python" train.py "${pretrain[@]}"
    local evaluate=("$python" lincls.py "${common[@]}" --pretrained "$folder/${names[$1]}/checkpoint_last.pth.tar"
                    "${lincls[@]}")
    for protocol in $protocols; do
        case $protocol in
            classic) "${evaluate[@]}" --lr "${rates[@]}" "${classic[@]}" ;;
            cached) "${evaluate[@]}" --lr "${rates[@]}" --features cached ;;
            knn) "${evaluate[@]}" --knn ;;
        esac
    done
    echo "$mark" > "$folder/finished"
}

# Waits until fewer than $1 runs are left. Where one has failed, and at Ctrl-C, which the runs hear themselves, the script
# starts no more and ends with that code when those beside it have ended: after Ctrl-C as they do, with 75.
running=0
leave_fewer_than() {
    local code=0
    while [ "$code" = 0 ] && [ "$running" -ge "$1" ]; do
        wait -n || code=$?
        running=$((running - 1))
    done
    if [ "$code" != 0 ]; then
        [ "$code" != 130 ] || code=75
        echo "$0: stops with code $code when the runs that have begun have ended" >&2
        wait
        exit "$code"
    fi
}

# A run that says its last line to the script's own error output, 3, where it has failed.
logged_run() {
    log=${runs[$1]}.log
    trap 'code=$?; [ "$code" = 0 ] || echo "=> code $code, $log: $(tail -n 1 "$log")" >&3' EXIT
    one_run "$1"
}

mkdir -p "$out" 2> /dev/null || { echo "$0: error: OUT=$out: cannot be made" >&2; exit 2; }
if [ ${#subset[@]} != 0 ] && [ ! -d "$images" ]; then
    "$python" scripts/tools/make_subset.py "$images" "${subset[@]}"
    echo "$whole" > "$images/made_from"
fi
for i in "${!runs[@]}"; do
    if [ "${home[${names[i]}]}" != "${runs[i]}" ]; then
        echo "=> ${runs[i]}: is ${home[${names[i]}]}"
    elif [ "$jobs" = 1 ]; then
        one_run "$i"
    else
        leave_fewer_than "$jobs"
        echo "=> ${runs[i]}.log"
        trap ':' INT        # so that the script waits for them, which get it too
        logged_run "$i" 3>&2 >> "${runs[i]}.log" 2>&1 &
        running=$((running + 1))
    fi
done
leave_fewer_than 1

plot=(--png "$out/results.png")
if (cd "$out" && compgen -G '*_--*') > /dev/null; then      # runs of VARIANTS, which one plot cannot show
    rm -f "$out/results.png"
    plot=()
fi
"$python" scripts/experiments/collect_results.py "$out" "${plot[@]}" > "$out/results.md.part"
mv "$out/results.md.part" "$out/results.md"
cat "$out/results.md"
