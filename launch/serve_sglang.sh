#!/usr/bin/env bash
# SGLang, or sglang-jax on TPUs, with a run's draft.
set -euo pipefail

usage() {
  cat <<'HELP'
Usage: launch/serve_sglang.sh --run RUN [--export DIR] [--target REF] [--draft-tokens N] [--jax] [--print-only]
                              [-- OPTIONS...]

Starts SGLang's server with the draft that converters/to_sglang.py wrote for a run, and its target. What SGLang could
not serve as it was trained is refused.

  --run RUN          the run's folder, runs/NAME
  --export DIR       the export (default: RUN/exports/sglang)
  --target REF       the target's folder or hub id (default: as the export names it)
  --draft-tokens N   tokens drafted before each verification (default 3)
  --jax              sglang-jax, for TPUs, in place of SGLang
  --print-only       print what would be started, and start nothing
  --help             this text

What follows -- is handed on to the server, such as -- --port 30000 --mem-fraction-static 0.8.

Example:
  launch/serve_sglang.sh --run runs/llama3_8b -- --port 30000
HELP
}

source "$(dirname "${BASH_SOURCE[0]}")/serving.sh"

run="" export="" target="" draft_tokens=3 engine=SGLang module=sglang print_only=0
while (($#)); do
  case "$1" in
    --run | --export | --target | --draft-tokens)
      [[ -n "${2-}" ]] || die "$1 needs a value."
      name="${1#--}"
      printf -v "${name//-/_}" '%s' "$2"
      shift 2
      ;;
    --jax) engine=sglang-jax module=sgl_jax; shift ;;
    --print-only) print_only=1; shift ;;
    --help | -h) usage; exit 0 ;;
    --) shift; break ;;
    *) die "there is no option $1; what the server is to get comes after --, and --help lists the options." ;;
  esac
done
open_export sglang

serve=(python -m "$module.launch_server" --model-path "$target" --speculative-algorithm EAGLE3)
serve+=(--speculative-draft-model-path "$export" --speculative-num-steps "$draft_tokens" --speculative-eagle-topk 1)
serve+=(--speculative-num-draft-tokens "$((draft_tokens + 1))" "$@")
start "${serve[@]}"
