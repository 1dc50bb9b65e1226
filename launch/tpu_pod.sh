#!/usr/bin/env bash
# The same command on every host of a TPU slice.
set -euo pipefail

usage() {
  cat <<'HELP'
Usage: launch/tpu_pod.sh --name TPU --zone ZONE [--project ID] [--folder DIR] [--print-only] -- COMMAND...

Runs a command on every host of a Cloud TPU slice, over gcloud's ssh; the hosts find one another through the slice's
metadata. It runs any command, so that it also installs jeagle on all of them.

  --name TPU      name of the TPU VM
  --zone ZONE     its zone
  --project ID    its project (default: gcloud's own)
  --folder DIR    where jeagle lies on each host (default: jeagle, in the home folder)
  --print-only    print what would be started, and start nothing
  --help          this text

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

show() { # the command, quoted so that a shell reads it back
  local line
  line="$(printf '%q ' "$@")"
  echo "${line% }"
}

name="" zone="" project="" folder=jeagle print_only=0
while (($#)); do
  case "$1" in
    --name | --zone | --project | --folder)
      [[ -n "${2-}" ]] || die "$1 needs a value."
      [[ "$2" != -* ]] || die "$1 is '$2', which begins with a dash, as an option does: give another, or a folder as ./$2."
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    --print-only) print_only=1; shift ;;
    --help | -h) usage; exit 0 ;;
    --) shift; break ;;
    *) die "there is no option $1; the jeagle command comes after --, and --help lists the options." ;;
  esac
done
[[ -n "$name" ]] || die "--name is missing: give the name of the TPU VM."
[[ -n "$zone" ]] || die "--zone is missing: give the zone of the TPU VM, such as us-east5-b."
(($#)) || die "no command: put the jeagle command after --, such as -- python -m jeagle.train --config FILE."
[[ "$1" != -* ]] || die "the command is '$1', which begins with a dash, as an option does: the command comes first."

remote="$(show cd "$folder") && $(show env JEAGLE_DISTRIBUTED=auto "$@")"
run=(gcloud compute tpus tpu-vm ssh "$name" "--zone=$zone" --worker=all)
[[ -z "$project" ]] || run+=("--project=$project")
run+=("--command=$remote")
if ((print_only)); then
  show "${run[@]}"
  exit 0
fi
command -v gcloud >/dev/null || die "gcloud is not installed here: it is what reaches the hosts of a TPU slice."
exec "${run[@]}"
