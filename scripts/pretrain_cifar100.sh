#!/usr/bin/env bash
# SogCLR on CIFAR-100 (downloaded if missing) with the settings of pretrain_cifar10.sh.
# Needs: 1 GPU. No result is reported or measured; solo-learn reports 65.78 for SimCLR, ResNet-18, 1000 epochs.
# Arguments are appended, so any flag can be overridden. The same command continues an interrupted run.
set -euo pipefail
exec bash "$(dirname "$0")/pretrain_cifar10.sh" --data_name cifar100 --data "${DATA:-data/cifar100}" "$@"
