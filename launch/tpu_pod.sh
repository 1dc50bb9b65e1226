#!/usr/bin/env bash
# Runs a command on every host of a TPU slice.
set -euo pipefail

usage() {
  cat <<'HELP'
Usage: launch/tpu_pod.sh --name TPU --zone ZONE [--project ID] [--folder DIR] [--print-only] -- COMMAND...

Runs a command on every host of a Cloud TPU slice through gcloud's ssh. The hosts find one another through the metadata
of the slice. Any command can be run, for example those that install jeagle on all hosts.

  --name TPU      name of the TPU VM
  --zone ZONE     zone of the TPU VM
  --project ID    project of the TPU VM (default: gcloud's own)
  --folder DIR    folder of jeagle on each host (default: jeagle, in the home folder)
  --print-only    print the command without starting it
  --help          show this text

Examples:
  launch/tpu_pod.sh --name my-slice --zone us-east5-b -- make .venv
  launch/tpu_pod.sh --name my-slice --zone us-east5-b -- .venv/bin/pip install -c constraints.txt -e '.[tpu]'
  launch/tpu_pod.sh --name my-slice --zone us-east5-b -- \
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

name="" zone="" project="" folder=jeagle print_only=0
while (($#)); do
  case "$1" in
    --name | --zone | --project | --folder)
      [[ -n "${2-}" ]] || die "$1 needs a value."
      [[ "$2" != -* ]] || die "$1 is '$2', which begins with a dash, as an option does. Give another value, or write a folder as ./$2."
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    --print-only) print_only=1; shift ;;
    --help | -h) usage; exit 0 ;;
    --) shift; break ;;
    *) die "there is no option $1. Put the jeagle command after --; --help lists the options." ;;
  esac
done
[[ -n "$name" ]] || die "--name is missing. Give the name of the TPU VM."
[[ -n "$zone" ]] || die "--zone is missing. Give the zone of the TPU VM, such as us-east5-b."
(($#)) || die "there is no command. Put the jeagle command after --, such as -- python -m jeagle.train --config FILE."
[[ "$1" != -* ]] || die "the command '$1' begins with a dash, as an option does. Put the command first."

home="" below="$folder"
[[ "$folder" != "~"* ]] || home="~" below="${folder#?}" # the hosts' own home folder
remote="cd $home${below:+$(printf '%q' "$below")} && $(show env JEAGLE_DISTRIBUTED=auto "$@")"
run=(gcloud compute tpus tpu-vm ssh "$name" "--zone=$zone" --worker=all)
[[ -z "$project" ]] || run+=("--project=$project")
run+=("--command=$remote")
if ((print_only)); then
  show "${run[@]}"
  exit 0
fi
command -v gcloud >/dev/null || die "gcloud is not installed here. It is needed to reach the hosts of a TPU slice."
exec "${run[@]}"
