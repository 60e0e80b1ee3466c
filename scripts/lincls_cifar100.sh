#!/usr/bin/env bash
# Linear evaluation on CIFAR-100, like lincls_cifar10.sh.
# Needs: 1 GPU and the checkpoint as first argument. Hours: not measured, and no SogCLR result is reported.
# Further arguments are appended, so any flag can be overridden.
set -euo pipefail
exec bash "$(dirname "$0")/lincls_cifar10.sh" "${1:?usage: $0 CHECKPOINT [FLAGS]}" --data_name cifar100 \
    --data "${DATA:-data/cifar100}" "${@:2}"
