#!/usr/bin/env bash
# Teach the 1.3B model facts by full finetuning. Everything comes from the allocation.
#
#   sbatch slurm/full_ft.sh --stream.path facts.jsonl
#
# On a signal before the time limit, and on requeue, it goes on where it was.
#SBATCH --job-name=full_ft
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

source "${SLURM_SUBMIT_DIR:?run this with sbatch}/slurm/launch.sh"
launch train_configs/full_ft.toml -m titan_smf.train "$@"
