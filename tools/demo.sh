#!/usr/bin/env bash
# Set everything up, then run the whole pipeline on this machine, small: two processes, no GPU, no
# network data. A memory model is pretrained on an invented world and kept; its background is counted;
# then it learns new facts by sparse memory finetuning, by full finetuning and by LoRA. Arguments go
# to tools/reproduce.py, such as --reproduce.seeds 1.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

export CUDA_VISIBLE_DEVICES=  # on the CPU, whatever the machine has
export OMP_NUM_THREADS=1
exec torchrun --nproc_per_node 2 tools/reproduce.py --job.config train_configs/demo.toml "$@"
