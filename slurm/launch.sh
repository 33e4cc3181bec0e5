# Sourced by the job scripts. `launch CONFIG PROGRAM [OVERRIDE...]` runs PROGRAM, a script or
# `-m module`, under torchrun on every node; all that it needs to know comes from $SLURM_*. A script
# whose settings have a phase before them, as a plan's have, sets `phase`, as `common.`.
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -f .venv/bin/activate ]; then
  source .venv/bin/activate
fi

# The address, not the name, of the first node: names need not resolve on compute nodes.
first_node_address() {
  local node
  node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  scontrol show node "$node" | grep -o 'NodeAddr=[^ ]*' | cut -d = -f 2
}

# One process a GPU; on nodes without GPUs one process a task CPU.
processes_per_node() {
  if [ "${SLURM_GPUS_ON_NODE:-0}" -gt 0 ]; then
    echo "$SLURM_GPUS_ON_NODE"
  else
    echo "${SLURM_CPUS_PER_TASK:-1}"
  fi
}

launch() {
  local config=$1 program=("$2") stopping=0 code=0
  shift 2
  if [ "${program[0]}" = -m ]; then
    program+=("$1")
    shift
  fi
  case " $* " in *" --job.config"*) ;; *) set -- --job.config "$config" "$@" ;; esac
  # HSDP: each node holds the whole model and table, so that lookups stay inside a node.
  if [ "$SLURM_JOB_NUM_NODES" -gt 1 ] && [ "$(processes_per_node)" -gt 1 ]; then
    case " $* " in
      *parallelism.data_parallel_*) ;;
      *) set -- "$@" "--${phase:-}parallelism.data_parallel_replicate_degree" "$SLURM_JOB_NUM_NODES" ;;
    esac
  fi

  # srun does not take a job's CPUs a task by itself; without them all processes share one core.
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}
  # A program that is asked to stop may write a checkpoint before it is killed.
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}
  export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}  # no stack dumps at rendezvous shutdown
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  # SLURM sends USR1 ahead of the time limit to this shell only: pass it on as a stop request.
  trap 'stopping=1; scancel --signal=TERM "$SLURM_JOB_ID.0" || true' USR1
  srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc_per_node "$(processes_per_node)" \
    --rdzv_backend c10d \
    --rdzv_endpoint "$(first_node_address):$((20000 + SLURM_JOB_ID % 20000))" \
    --rdzv_id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    "${program[@]}" "$@" &
  local step=$!
  while kill -0 "$step" 2>/dev/null; do
    wait "$step" || true # a signal ends the wait, not the step
  done
  wait "$step" || code=$?
  if [ "$stopping" = 1 ] && [ "$code" != 0 ]; then  # 0: it was at its end all the same
    echo "stopped ahead of the time limit; requeued to go on from the last checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
  fi
  return "$code"
}
