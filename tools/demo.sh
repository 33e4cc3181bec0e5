#!/usr/bin/env bash
# Set everything up, then run the whole pipeline on this machine, small: two processes, no GPU, no
# network data. Arguments go to the training, such as --training.steps 1000.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

demo=outputs/demo
export CUDA_VISIBLE_DEVICES=  # on the CPU, whatever the machine has
say() { printf '\n== %s\n' "$*"; }

say "1/3  An invented world, as text and as token shards"
python tools/make_world.py "$demo/world"
python tools/prepare_data.py "$demo/world/train.jsonl" --output "$demo/data/train" \
    --train-tokenizer 1024
python tools/prepare_data.py "$demo/world/validation.jsonl" --output "$demo/data/validation" \
    --tokenizer-path "$demo/data/train/tokenizer.tiktoken"

say "2/3  Pretraining a Llama with a memory layer on two processes"
OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 -m titan_smf.train \
    --job.config train_configs/demo_pretrain.toml --job.dump_folder "$demo/pretrain" "$@"

say "3/3  What it has learned"
python tools/demo_summary.py "$demo/pretrain" "$demo/data/validation"
