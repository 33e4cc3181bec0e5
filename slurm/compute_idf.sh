#!/usr/bin/env bash
# Count how background data uses the memory slots of the 1.3B model. Everything comes from the allocation.
#
#   sbatch slurm/compute_idf.sh --idf.num_batches 1000
#
# On a signal before the time limit, and on requeue, it goes on where it was.
#SBATCH --job-name=compute_idf
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
launch train_configs/compute_idf.toml tools/compute_idf.py "$@"
