#!/usr/bin/env bash
#SBATCH --job-name=jeagle
#SBATCH --output=%x-%j.log
# The same command in every task of a Slurm job: one task a GPU.
set -euo pipefail

usage() {
  cat <<'HELP'
Usage: sbatch --nodes N --ntasks-per-node GPUS --gpus-per-node GPUS launch/slurm.sh [--print-only] -- COMMAND...

Runs a jeagle command in every task of a Slurm job, one task for each GPU. The tasks find one another through Slurm's
variables; the job fails as soon as one task does. Submit it from the folder of jeagle, which all nodes must see.

  --print-only   print what would be started, and start nothing
  --help         this text

Example:
  sbatch --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 launch/slurm.sh -- \
    .venv/bin/python -m jeagle.train --config configs/llama3_8b.py
HELP
}

die() {
  echo "error: $*" >&2
  exit 2
}

show() { # the command, quoted so that a shell reads it back
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
    *) die "there is no option $1; the jeagle command comes after --, and --help lists the options." ;;
  esac
done
(($#)) || die "no command: put the jeagle command after --, such as -- python -m jeagle.train --config FILE."
[[ "$1" != -* ]] || die "the command is '$1', which begins with a dash, as an option does: the command comes first."

run=(srun --kill-on-bad-exit=1 env JEAGLE_DISTRIBUTED=auto "$@")
if ((print_only)); then
  show "${run[@]}"
  exit 0
fi
[[ -n "${SLURM_JOB_ID-}" ]] || die "this is not a Slurm job: submit it with sbatch (--help shows how)."
exec "${run[@]}"
