#!/usr/bin/env bash
# Starts this node's processes of a run: launch/train.sh STRATEGY RUN [--set NAME.NAME=VALUE ...]
#
# STRATEGY      a file in launch/accelerate: cpu, ddp, zero2, zero3
# RUN           a YAML file or a shipped run; see `mmfuse train --help`
#
# Read from the environment, all optional:
#   NUM_PROCESSES      processes over all machines (default: GPUs of all machines; without GPUs 2 a machine)
#   NUM_MACHINES, MACHINE_RANK, MAIN_PROCESS_IP, MAIN_PROCESS_PORT      for more than one node
#   OMP_NUM_THREADS    CPU threads of each process (default 1)
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
usage() { sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

if [[ $# -lt 2 || $1 == -h || $1 == --help ]]; then usage; [[ ${1:-} == -h || ${1:-} == --help ]] && exit 0; exit 2; fi
strategy=$1 run=$2
shift 2
config=$here/accelerate/$strategy.yaml
if [[ ! -f $config ]]; then
  echo "train.sh: no strategy '$strategy'; there are: $(cd "$here/accelerate" && ls -- *.yaml | sed 's/\.yaml$//' | xargs)" >&2
  exit 2
fi

# The environment of `make`, where nobody has activated another.
if [[ -x $here/../.venv/bin/accelerate ]] && ! command -v accelerate >/dev/null; then PATH=$here/../.venv/bin:$PATH; fi

gpus=0
if [[ $strategy == cpu ]]; then :
elif [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | sed '/^ *-/,$d' | grep -c '[^[:space:]]' || true)
elif command -v nvidia-smi >/dev/null; then gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true); fi
machines=${NUM_MACHINES:-1}
if [[ $strategy == cpu ]]; then processes=1
elif [[ $gpus -gt 0 ]]; then processes=${NUM_PROCESSES:-$((gpus * machines))}
else processes=${NUM_PROCESSES:-$((2 * machines))}; fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false MMFUSE_NUM_PROCESSES=$processes
if [[ $gpus -eq 0 ]]; then
  export CUDA_VISIBLE_DEVICES=
  if [[ $strategy == zero* ]]; then
    export DS_ACCELERATOR=cpu
    if ! command -v g++ >/dev/null; then
      echo "train.sh: DeepSpeed on CPU compiles a small library once and needs g++; install it, or use the strategy ddp" >&2
      exit 5
    fi
  else
    export ACCELERATE_USE_CPU=true
  fi
fi

rendezvous=(--num_machines "$machines" --machine_rank "${MACHINE_RANK:-0}" --num_processes "$processes")
if [[ -n ${MAIN_PROCESS_IP:-} ]]; then rendezvous+=(--main_process_ip "$MAIN_PROCESS_IP"); fi
rendezvous+=(--main_process_port "${MAIN_PROCESS_PORT:-$([[ $machines -gt 1 ]] && echo 29500 || echo 0)}")

exec accelerate launch --config_file "$config" "${rendezvous[@]}" -m mmfuse train "$run" "$@"
