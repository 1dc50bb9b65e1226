#!/usr/bin/env bash
# Runs a command on all GPUs of one machine, in one process or in several that share them.
set -euo pipefail

usage() {
  cat <<'HELP'
Usage: launch/gpu_node.sh [--processes N] [--port PORT] [--print-only] -- COMMAND...

Runs a jeagle command on this machine. With one process, which is the default, the command uses every GPU. With N
processes, each uses an equal share of the GPUs, if there are any. The processes find one another through
JEAGLE_COORDINATOR, JEAGLE_PROCESSES and JEAGLE_PROCESS_ID. If one fails, all of them are stopped. SIGINT and SIGTERM
are passed on to all processes.

  --processes N   number of processes on this machine (default 1)
  --port PORT     port on which process 0 listens (default: the first free port from 8476 on)
  --print-only    print the commands without starting them
  --help          show this text

Example:
  launch/gpu_node.sh --processes 8 -- python -m jeagle.train --config configs/llama3_8b.py
HELP
}

die() {
  echo "error: $*" >&2
  exit 2
}

show() { # prints a command, quoted for a shell
  local line
  line="$(printf '%q ' "$@")"
  echo "${line% }"
}

processes=1 port="" print_only=0
while (($#)); do
  case "$1" in
    --processes) processes="${2-}"; [[ $# -ge 2 ]] || die "--processes needs a number."; shift 2 ;;
    --port) port="${2-}"; [[ $# -ge 2 ]] || die "--port needs a number."; shift 2 ;;
    --print-only) print_only=1; shift ;;
    --help | -h) usage; exit 0 ;;
    --) shift; break ;;
    *) die "there is no option $1. Put the jeagle command after --; --help lists the options." ;;
  esac
done
[[ "$processes" =~ ^[1-9][0-9]*$ ]] || die "--processes is '$processes'; it must be a whole number from 1 on."
[[ "$port" =~ ^[0-9]*$ ]] || die "--port is '$port'; it must be a whole number."
(($#)) || die "there is no command. Put the jeagle command after --, such as -- python -m jeagle.train --config FILE."
[[ "$1" != -* ]] || die "the command '$1' begins with a dash, as an option does. Put the command first."

count_gpus() {
  if [[ "${JAX_PLATFORMS-}" == cpu ]]; then
    echo 0
  elif [[ -n "${CUDA_VISIBLE_DEVICES-}" ]]; then
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .
  elif command -v nvidia-smi >/dev/null; then
    nvidia-smi -L | grep -c '^GPU' || true
  else
    echo 0
  fi
}

free_port() {
  local candidate=8476
  while (exec 3<>"/dev/tcp/127.0.0.1/$candidate") 2>/dev/null; do candidate=$((candidate + 1)); done
  echo "$candidate"
}

if ((processes == 1)); then
  if ((print_only)); then
    show "$@"
    exit 0
  fi
  exec "$@"
fi

gpus="$(count_gpus)"
((gpus % processes == 0)) || die "$processes processes cannot share $gpus GPUs evenly. Choose a divisor of $gpus."
[[ -n "$port" ]] || port="$(free_port)"

# Sets `settings` to the variables of process $1.
settings_of() {
  settings=("JEAGLE_COORDINATOR=127.0.0.1:$port" "JEAGLE_PROCESSES=$processes" "JEAGLE_PROCESS_ID=$1")
  local share=$((gpus / processes))
  if ((share)); then
    settings+=("JAX_LOCAL_DEVICE_IDS=$(seq -s, $(($1 * share)) $(($1 * share + share - 1)))")
  fi
}

if ((print_only)); then
  for ((id = 0; id < processes; id++)); do
    settings_of "$id"
    echo "$(show env "${settings[@]}" "$@") &"
  done
  exit 0
fi

set -m # each process gets a process group of its own, so that Ctrl-C reaches it only through the traps
pids=()
send() { for pid in ${pids[@]+"${pids[@]}"}; do kill "-$1" -- "-$pid" 2>/dev/null || true; done; }
trap 'send INT' INT
trap 'send TERM' TERM
for ((id = 0; id < processes; id++)); do
  settings_of "$id"
  env "${settings[@]}" "$@" </dev/null &
  pids+=("$!")
done

status=0 deadline=0
while ((${#pids[@]})); do
  alive=()
  for pid in "${pids[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      alive+=("$pid")
      continue
    fi
    code=0
    wait "$pid" || code=$?
    ((status)) || status=$code
  done
  pids=(${alive[@]+"${alive[@]}"})
  if ((status && !deadline)); then # the others would wait for the failed process
    send TERM
    deadline=$((SECONDS + 15))
  fi
  if ((deadline && SECONDS >= deadline)); then send KILL; fi
  if ((${#pids[@]})); then sleep 0.2 || true; fi
done
exit "$status"
