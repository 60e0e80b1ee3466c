#!/usr/bin/env bash
# From a clean clone to a first result: sets up .venv (or uses PYTHON=...), pretrains ResNet-18 with SogCLR on generated
# images, and compares linear classifiers on the pretrained and on a random encoder. Needs no GPU and no data; takes
# 3 minutes on two CPU cores after the installation, 3.5 with AVX-512 off. SEED=... for another seed (default 1).
set -euo pipefail
[ $# = 0 ] || { echo "quickstart.sh: takes no arguments, only PYTHON=... and SEED=... in the environment" >&2; exit 2; }
source "$(dirname "$0")/environment.sh"

export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0}       # one GPU is plenty, none is fine
seed=${SEED:-1}
out=quickstart/seed_$seed
common=(--data_name shapes --arch resnet18 --stem imagenet --seed "$seed" --save_dir "$out" --resume auto)
pretrain=("$PYTHON" train.py "${common[@]}" --batch-size 64 --epochs 12 --warmup-epochs 1 --lr 0.15 --crop-min 0.3)

if [ ! -e "$out" ]; then
    echo "=> two idle CPU cores need 2 to 3 minutes for pretraining and half a minute for the evaluation; if other programs
   keep them busy, OMP_WAIT_POLICY=passive makes it many times faster. Estimating for this machine ..."
    "${pretrain[@]}" --dry-run | tail -n 1
fi
"${pretrain[@]}"

evaluate() {
    "$PYTHON" lincls.py "${common[@]}" --features cached --batch-size 256 --epochs 30 "$@" |
        tee "$out/lincls.log" | grep "^=>"
}
accuracy() { sed -n 's/^=> last epoch: Acc@1 \([0-9.]*\) .*/\1/p' "$out/lincls.log"; }
evaluate --pretrained "$(ls "$out"/shapes_*/checkpoint_0011.pth.tar)"
pretrained=$(accuracy)
evaluate
random=$(accuracy)

echo "TensorBoard: ${PYTHON%python*}tensorboard --logdir $out"
LC_ALL=C printf 'linear accuracy: pretrained encoder %.1f %%, random encoder %.1f %%, chance 10 %%\n' "$pretrained" "$random"
