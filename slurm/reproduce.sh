#!/usr/bin/env bash
# Compare methods of learning at the paper's sizes. Everything comes from the allocation.
#
#   sbatch slurm/reproduce.sh --reproduce.seeds 0
#
# On a signal before the time limit, and on requeue, it goes on after the last run that was complete.
#SBATCH --job-name=reproduce
#SBATCH --nodes=1
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
phase=common.
launch train_configs/reproduce_paper.toml tools/reproduce.py "$@"
