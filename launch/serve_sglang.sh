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

engine=SGLang module=sglang
own_option() {
  [[ "$1" == --jax ]] && engine=sglang-jax module=sgl_jax
}
read_options "$@"
open_export sglang

serve=(python -m "$module.launch_server" --model-path "$target" --speculative-algorithm EAGLE3)
serve+=(--speculative-draft-model-path "$export" --speculative-num-steps "$draft_tokens" --speculative-eagle-topk 1)
serve+=(--speculative-num-draft-tokens "$((draft_tokens + 1))" ${more[@]+"${more[@]}"})
start "${serve[@]}"
