#!/usr/bin/env bash
# Set everything up, then run the whole pipeline on this machine, small: two processes, no GPU, no
# network data.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

output=outputs/demo
torchrun --nproc_per_node 2 -m titan_smf.train \
    --job.config train_configs/demo_pretrain.toml --job.dump_folder "$output"
