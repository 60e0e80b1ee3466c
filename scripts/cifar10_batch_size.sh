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
data_name=${DATA_NAME:-cifar10} data=${DATA:-data/cifar10} make_subset=()
if [ ${#subset[@]} != 0 ]; then
    images="${data_name/#folder/$(basename "$data")} ${subset[*]//--/}"
    images=$out/images_${images//[ \/]/_}
    [ -d "$images" ] || make_subset=("$python" scripts/make_subset.py "$images" --data_name "$data_name" --data "$data"
                                     "${subset[@]}")
    data_name=folder data=$images
fi
rates=(0.001 0.003 0.01 0.03 0.1 0.3 1 3)

# Calls $1 with each run's FOLDER LOSS BATCH SEED [flags of train.py], the flags being those after $1 and the variant's.
for_each_run() {
    local seed variant batch loss flags
    for seed in ${SEEDS:-1 2 3}; do
        for variant in "${variants[@]}"; do
            read -ra flags <<< "$variant"
            for batch in ${BATCHES:-32 64 128 256 512}; do
                for loss in ${LOSSES:-cl dcl}; do
                    case $loss$variant in cl*--gamma*) continue ;; esac         # SimCLR has none
                    "$1" "$out/${loss}_${batch}_$seed${variant:+_${variant//[ \/]/_}}" "$loss" "$batch" "$seed" \
                        "${@:2}" "${flags[@]}"
                done
            done
        done
    done
}

# Of a run: `common`, what train.py and lincls.py get alike, and `pretrain`, all that train.py gets.
set_flags() {
    common=(--data_name "$data_name" --data "$data" --image-size 32 --arch resnet18 --seed "$4"
            --workers "$((jobs < 16 ? 16 / jobs : 1))" --save_dir "$1" --resume auto --print-freq 100)
    pretrain=("${common[@]}" --loss_type "$2" --batch-size "$3" --epochs 200 --lr 1.0 --learning-rate-scaling linear
              --wd 1e-4 --t 0.3 --gamma 0.9 --save-freq 1000 "${@:5}")
}

# Before anything is made: all flags are known to train.py and lincls.py, no folder holds another run, and what is asked
# for twice, as where an argument is a variant's too, is done once.
folders=() calls=()
plan() {
    set_flags "$@"
    folders+=("$1")
    calls+=("$(printf '%q ' "${pretrain[@]}")")
}
for_each_run plan "$@"
names=$(printf '%s\n' "${calls[@]}" | "$python" -c '
import shlex, sys
sys.argv[0] = "lincls.py"       # which speaks of a wrong flag
from lincls import PARSER
PARSER.parse_args(sys.argv[1:])
sys.argv[0] = "train.py"
from train import PARSER, run_name
for call in sys.stdin:
    print(run_name(PARSER.parse_args(shlex.split(call))))' "${lincls[@]}" "${classic[@]}")
mapfile -t names <<< "$names"
declare -A name_in first_with
for i in "${!folders[@]}"; do
    for other in "${folders[i]}"/*_bz_*/checkpoint_last.pth.tar; do
        if [ -e "$other" ] && [ "$other" != "${folders[i]}/${names[i]}/checkpoint_last.pth.tar" ]; then
            echo "$0: error: ${folders[i]}: holds a run with other settings, name another OUT" >&2
            exit 2
        fi
    done
    name_in[${folders[i]}]=${names[i]}
    : "${first_with[${names[i]}]:=${folders[i]}}"
done

# Pretraining and evaluation
one_run() {
    set_flags "$@"
    local runs=$1 all="$* | $protocols | ${LINCLS:-} | ${CLASSIC:-} | $data_name | $data"
    if [ "$(cat "$runs/finished" 2> /dev/null)" = "$all" ]; then
        echo "=> $runs: is finished"
        return
    fi
    "$python" train.py "${pretrain[@]}"
    local protocol evaluate=("$python" lincls.py "${common[@]}"
                             --pretrained "$runs/${name_in[$runs]}/checkpoint_last.pth.tar" "${lincls[@]}")
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
    log=$1.log
    trap 'code=$?; [ "$code" = 0 ] || echo "=> code $code, $log: $(tail -n 1 "$log")" >&3' EXIT
    one_run "$@"
}

start() {
    local runs=$1 first=${first_with[${name_in[$1]}]}
    if [ "$first" != "$runs" ]; then
        echo "=> $runs: is $first"
    elif [ "$jobs" = 1 ]; then
        one_run "$@"
    else
        leave_fewer_than "$jobs"
        echo "=> $runs.log"
        trap ':' INT        # so that the script waits for them, which get it too
        logged_run "$@" 3>&2 >> "$runs.log" 2>&1 &
        running=$((running + 1))
    fi
}
mkdir -p "$out" 2> /dev/null || { echo "$0: error: OUT=$out: cannot be made" >&2; exit 2; }
[ ${#make_subset[@]} = 0 ] || "${make_subset[@]}"
for_each_run start "$@"
leave_fewer_than 1
plot=(--png "$out/results.png")
if (cd "$out" && compgen -G '*_--*') > /dev/null; then      # runs of VARIANTS, which one plot cannot show
    rm -f "$out/results.png"
    plot=()
fi
"$python" scripts/collect_results.py "$out" "${plot[@]}" | tee "$out/results.md"
