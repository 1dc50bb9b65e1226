#!/usr/bin/env bash
#SBATCH --job-name=jeagle
#SBATCH --output=%x-%j.log
# Runs a command in every task of a Slurm job, with one task for each GPU.
set -euo pipefail

usage() {
  cat <<'HELP'
Usage: sbatch --nodes N --ntasks-per-node GPUS --gpus-per-node GPUS launch/slurm.sh [--print-only] -- COMMAND...

Runs a jeagle command in every task of a Slurm job, with one task for each GPU. The tasks find one another through
Slurm's variables. The job fails as soon as one task fails. Submit it from jeagle's folder, which must be on a disk that
all nodes share.

  --print-only   print the command without starting it
  --help         show this text

Example:
  sbatch --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 launch/slurm.sh -- \
    .venv/bin/python -m jeagle.train --config configs/llama3_8b.py
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

print_only=0
while (($#)); do
  case "$1" in
    --print-only) print_only=1; shift ;;
    --help | -h) usage; exit 0 ;;
    --) shift; break ;;
    *) die "there is no option $1. Put the jeagle command after --; --help lists the options." ;;
  esac
done
(($#)) || die "there is no command. Put the jeagle command after --, such as -- python -m jeagle.train --config FILE."
[[ "$1" != -* ]] || die "the command '$1' begins with a dash, as an option does. Put the command first."

run=(srun --kill-on-bad-exit=1 env JEAGLE_DISTRIBUTED=auto "$@")
if ((print_only)); then
  show "${run[@]}"
  exit 0
fi
[[ -n "${SLURM_JOB_ID-}" ]] || die "this is not a Slurm job. Submit it with sbatch; --help shows how."
exec "${run[@]}"
