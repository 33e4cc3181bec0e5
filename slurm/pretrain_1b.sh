#!/usr/bin/env bash
# Pretrain the 1.3B memory model on a cluster. Everything comes from the allocation.
#
#   sbatch slurm/pretrain_1b.sh                                    4 nodes of 8 GPUs
#   sbatch --nodes 1 slurm/pretrain_1b.sh --training.steps 1000    overrides pass through
#   sbatch --nodes 2 --gpus-per-node 0 --cpus-per-task 2 slurm/pretrain_1b.sh \
#       --job.config train_configs/debug_pretrain.toml             a trial without GPUs
#
# On a signal before the time limit, and on requeue, the run goes on from its newest checkpoint.
#SBATCH --job-name=pretrain_1b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

source "${SLURM_SUBMIT_DIR:?run this with sbatch}/slurm/launch.sh"
launch train_configs/pretrain_1b.toml -m titan_smf.train "$@"
