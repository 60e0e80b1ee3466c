#!/usr/bin/env bash
# From a clean clone to a first result: sets up .venv (or uses PYTHON=...), pretrains ResNet-18 with SogCLR on generated
# images, and compares linear classifiers on the pretrained and on a random encoder. Needs no GPU and no data; takes
# about 6 minutes on two CPU cores after the installation. SEED=... for another seed (default 1).
set -euo pipefail
[ $# = 0 ] || { echo "quickstart.sh: takes no arguments, only PYTHON=... and SEED=... in the environment" >&2; exit 2; }
source "$(dirname "$0")/environment.sh"

export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0}       # one GPU is plenty, none is fine
seed=${SEED:-1}
out=quickstart/seed_$seed
common=(--data_name shapes --arch resnet18 --stem imagenet --seed "$seed" --save_dir "$out" --resume auto)

"$PYTHON" train.py "${common[@]}" --batch-size 128 --epochs 30 --warmup-epochs 3 --lr 0.3 --crop-min 0.3

evaluate() { "$PYTHON" lincls.py "${common[@]}" --batch-size 256 --epochs 15 --lr 0.3 "$@" | tee "$out/lincls.log"; }
accuracy() { sed -n 's/^=> last epoch: Acc@1 \([0-9.]*\) .*/\1/p' "$out/lincls.log"; }
evaluate --pretrained "$(ls "$out"/shapes_*/checkpoint_0029.pth.tar)"
pretrained=$(accuracy)
evaluate
random=$(accuracy)

echo "TensorBoard: ${PYTHON%python*}tensorboard --logdir $out"
LC_ALL=C printf 'pretrained encoder: Acc@1 %.1f\nrandom encoder: Acc@1 %.1f\n' "$pretrained" "$random"
