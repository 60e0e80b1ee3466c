#!/usr/bin/env bash
# The run of pretrain_imagenet1k.sh on one GPU: the same batch, and so the same result up to the rounding of sums.
# Needs: 1 GPU that fits 256 pairs of views (--dry-run reports the memory), GPU=number (default 0), and DATA as there.
# Hours: 167 on an H100, extrapolated; at best 228 on an A100. Memory: 21 GiB (H100, bf16).
# Arguments are appended. The same command continues an interrupted run.
set -euo pipefail
CUDA_VISIBLE_DEVICES=${GPU:-0} exec bash "$(dirname "$0")/pretrain_imagenet1k.sh" "$@"
