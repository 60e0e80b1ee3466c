#!/usr/bin/env bash
# Which part of SogCLR helps at a small batch? cifar10_batch_size_cpu.sh at batch 16, with the moving average (gamma 0.9),
# without it (gamma 1: an anchor's negatives of this batch alone, as in SimCLR, but its positive is not among them), with
# one over many visits (gamma 0.2), and at a lower temperature. gradient_bias.py compares the gradients of the same.
# Needs: no GPU, but 15 minutes a run on one core, of which there are 24: 3 hours with JOBS=2 on two cores.
# OUT, SEEDS, JOBS, DATA and DATA_NAME are as there. Arguments, but not --t and --gamma, are appended to train.py's. The
# same command continues where it was cut off.
set -euo pipefail
export CALLERS=cifar10_gamma_cpu.sh
export OUT=${OUT:-saved_models/cifar10_gamma_cpu} BATCHES=${BATCHES:-16} VARIANTS="
--gamma 1
--gamma 0.2
--t 0.05
--t 0.05 --gamma 1
--t 0.05 --gamma 0.2"
exec bash "$(dirname "$0")/cifar10_batch_size_cpu.sh" "$@"
