#!/usr/bin/env bash
# Starts this node's processes of a run: launch/train.sh STRATEGY RUN [--set NAME.NAME=VALUE ...]
#
# STRATEGY      a file in launch/accelerate: cpu, ddp, zero1, zero2, zero3, zero3_offload, fsdp2;
#               or your own: a DeepSpeed FILE.json, or an Accelerate FILE.yaml
# RUN           a YAML file or a shipped run; see `mmfuse train --help`
#
# Read from the environment, all optional:
#   NUM_PROCESSES      processes over all machines (default: GPUs of all machines; without GPUs 2 a machine)
#   NUM_MACHINES, MACHINE_RANK, MAIN_PROCESS_IP, MAIN_PROCESS_PORT      for more than one node
#   MAX_RESTARTS       how often to start again, from the newest checkpoint, after a process died or hung, or the run rolled
#                      back (default 0)
#   OMP_NUM_THREADS    CPU threads of each process (default 1; where the CPU keeps the optimizer, all cores by parts)
#
# SIGTERM or SIGUSR1 to this script, or a file STOP in the run's folder: the run writes a checkpoint and stops.
# Exit codes: those of `mmfuse` (see its --help); 75: stopped so, hung, or rolled back; started again, it goes on.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
usage() { sed -n '2,17s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

if [[ $# -lt 2 || $1 == -h || $1 == --help ]]; then usage; [[ ${1:-} == -h || ${1:-} == --help ]] && exit 0; exit 2; fi
strategy=$1 run=$2
shift 2
case $strategy in
  *.json) config=(--config_file "$here/deepspeed_json.yaml" --deepspeed_config_file "$strategy") file=$strategy ;;
  *.yaml) config=(--config_file "$strategy") file=$strategy ;;
  *) file=$here/accelerate/$strategy.yaml config=(--config_file "$here/accelerate/$strategy.yaml") ;;
esac
if [[ ! -f $file ]]; then
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

threads=1
offload='offload_optimizer_device:(cpu|nvme)|"offload_optimizer":\{[^}]*"device":"(cpu|nvme)"'
if tr -d '[:space:]' <"$file" | grep -Eq "$offload"; then threads=$(($(nproc) * machines / processes)); fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))} TOKENIZERS_PARALLELISM=false MMFUSE_NUM_PROCESSES=$processes
if [[ $gpus -eq 0 ]]; then
  export CUDA_VISIBLE_DEVICES=
  if [[ $file == *.json ]] || grep -q 'DEEPSPEED' "$file"; then
    export DS_ACCELERATOR=cpu
    if ! command -v g++ >/dev/null; then
      echo "train.sh: DeepSpeed on CPU compiles a small library once and needs g++; install it, or use the strategy ddp" >&2
      exit 5
    fi
  else
    export ACCELERATE_USE_CPU=true
  fi
fi

port=${MAIN_PROCESS_PORT:-$([[ $machines -gt 1 ]] && echo 29500 || echo 0)}
if [[ $machines -gt 1 ]] && [[ -z ${MAIN_PROCESS_IP:-} || $port -eq 0 ]]; then
  echo "train.sh: NUM_MACHINES=$machines: every node needs MAIN_PROCESS_IP, the name or address of node 0, and one port" >&2
  exit 2
fi
machine_rank=$([[ $machines -gt 1 ]] && echo "${MACHINE_RANK:-0}" || echo 0)
rendezvous=(--num_machines "$machines" --machine_rank "$machine_rank" --num_processes "$processes")
if [[ -n ${MAIN_PROCESS_IP:-} ]]; then rendezvous+=(--main_process_ip "$MAIN_PROCESS_IP"); fi
rendezvous+=(--main_process_port "$port")

# The launcher would kill everything 30 s after a SIGTERM. So it does not hear of it, and the run is asked by a file.
MMFUSE_LAUNCH_DIR=$(mktemp -d)
export MMFUSE_LAUNCH_DIR PET_SIGNALS_TO_HANDLE=SIGINT,SIGHUP,SIGQUIT
trap 'rm -rf "$MMFUSE_LAUNCH_DIR"' EXIT
interrupted=
trap 'touch "$MMFUSE_LAUNCH_DIR/stop"' TERM USR1
set -m   # a process group of its own, which Ctrl-C reaches through us
told() { [[ -f $MMFUSE_LAUNCH_DIR/$1 ]]; }

start() {   # sets `status`
  rm -f "$MMFUSE_LAUNCH_DIR/outcome"
  (
    trap '' TERM USR1
    if [[ $machine_rank -gt 0 ]]; then python3 -m mmfuse.train.join_node "$MAIN_PROCESS_IP" "$port" "$machine_rank"; fi
    exec accelerate launch "${config[@]}" "${rendezvous[@]}" -m mmfuse train "$run" "$@"
  ) &
  launcher=$!
  trap 'interrupted=yes; kill -INT -- "-$launcher"' INT HUP QUIT
  status=0
  wait "$launcher" || status=$?
  while kill -0 "$launcher" 2>/dev/null; do wait "$launcher" || true; done   # a signal only ended the waiting
  wait "$launcher" 2>/dev/null && status=0 || status=$?
  if told outcome; then
    outcome=$(<"$MMFUSE_LAUNCH_DIR/outcome")
    if [[ $status -ne 0 || $outcome -eq 75 ]]; then status=$outcome; fi
  elif [[ $status -ne 0 ]] && told stop; then status=75; fi   # asked before there was anything to save
}

# Not torchrun's own restarts: its store tells new processes the addresses of dead ones (torch 2.11).
start "$@"
for ((attempt = 1; attempt <= ${MAX_RESTARTS:-0}; attempt++)); do
  if [[ $interrupted ]] || told stop || { told outcome && [[ $status -ne 75 ]]; } || [[ $status -eq 0 ]]; then break; fi
  echo "train.sh: ended with $status; starting again, $attempt of $MAX_RESTARTS" >&2
  start "$@"
done
exit "$status"
