#!/usr/bin/env bash
# Submit pretraining, the background count and sparse finetuning, each after the one before it.
#
#   slurm/pipeline.sh FOLDER [SBATCH_OPTION...]
#
# The runs go to FOLDER/pretrain, FOLDER/idf and FOLDER/sparse_ft. Options of sbatch are those of all
# three jobs. Settings come from PRETRAIN, IDF and SPARSE_FT, words that are passed through:
#
#   SPARSE_FT="--stream.path facts.jsonl" slurm/pipeline.sh /scratch/experiment --account me
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:?usage: slurm/pipeline.sh FOLDER [SBATCH_OPTION...]}
shift

submit() { sbatch --parsable --kill-on-invalid-dep=yes "$@"; }

# Words, not one string: each variable holds several options.
# shellcheck disable=SC2086
pretrain=$(submit "$@" slurm/pretrain_1b.sh ${PRETRAIN:-} --job.dump_folder "$folder/pretrain")
# shellcheck disable=SC2086
count=$(submit --dependency="afterok:$pretrain" "$@" slurm/compute_idf.sh ${IDF:-} \
  --checkpoint.initial_load_path "$folder/pretrain" --job.dump_folder "$folder/idf")
# shellcheck disable=SC2086
learn=$(submit --dependency="afterok:$count" "$@" slurm/sparse_ft.sh ${SPARSE_FT:-} \
  --checkpoint.initial_load_path "$folder/pretrain" --job.dump_folder "$folder/sparse_ft" \
  --selection.idf_path "$folder/idf/idf.safetensors")
echo "jobs: pretraining $pretrain, count $count, sparse finetuning $learn; runs in $folder"
