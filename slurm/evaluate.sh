#!/usr/bin/env bash
# Evaluate a checkpoint of the 1.3B model. Everything comes from the allocation.
#
#   sbatch slurm/evaluate.sh --checkpoint.initial_load_path /scratch/experiment/sparse_ft
#   sbatch slurm/evaluate.sh --checkpoint.initial_load_path RUN --job.config RUN/config.toml \
#       --evaluation.sets questions.jsonl                          another model
#
# Each set is in results.jsonl as soon as it is done. Ended by the time limit: give a longer one, or
# the sets that are left.
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=02:00:00
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

source "${SLURM_SUBMIT_DIR:?run this with sbatch}/slurm/launch.sh"
launch train_configs/evaluate.toml tools/evaluate.py "$@"
