#!/usr/bin/env bash
# Starts SGLang, or sglang-jax on TPUs, with a run's draft.
set -euo pipefail

usage() {
  cat <<'HELP'
Usage: launch/serve_sglang.sh --run RUN [--export DIR] [--target REF] [--draft-tokens N] [--jax] [--print-only]
                              [-- OPTIONS...]

Starts SGLang's server with a run's target and the draft that converters/to_sglang.py exported. A draft that SGLang
cannot serve as it was trained is refused.

  --run RUN          folder of the run, runs/NAME
  --export DIR       folder of the export (default: RUN/exports/sglang)
  --target REF       folder or hub id of the target (default: the target that the export names)
  --draft-tokens N   number of tokens that are drafted before each verification (default 3)
  --jax              start sglang-jax, for TPUs, instead of SGLang
  --print-only       print the command without starting it
  --help             show this text

Options after -- are passed on to the server, such as -- --port 30000 --mem-fraction-static 0.8.

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
