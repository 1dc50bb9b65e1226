#!/usr/bin/env bash
# vLLM with a run's draft.
set -euo pipefail

usage() {
  cat <<'HELP'
Usage: launch/serve_vllm.sh --run RUN [--export DIR] [--target REF] [--draft-tokens N] [--print-only] [-- OPTIONS...]

Starts vLLM's server with the draft that converters/to_vllm.py wrote for a run, and its target. What vLLM could not
serve as it was trained is refused.

  --run RUN          the run's folder, runs/NAME
  --export DIR       the export (default: RUN/exports/vllm)
  --target REF       the target's folder or hub id (default: as the export names it)
  --draft-tokens N   tokens drafted before each verification (default 3)
  --print-only       print what would be started, and start nothing
  --help             this text

What follows -- is handed on to the server, such as -- --port 8000 --max-model-len 8192.

Example:
  launch/serve_vllm.sh --run runs/llama3_8b -- --port 8000
HELP
}

source "$(dirname "${BASH_SOURCE[0]}")/serving.sh"

engine=vLLM
own_option() {
  false
}
read_options "$@"
open_export vllm

config='import json, sys; print(json.dumps({"method": "eagle3", "model": sys.argv[1],
"num_speculative_tokens": int(sys.argv[2])}))'
serve=(vllm serve "$target" --speculative-config "$("${PYTHON:-python3}" -c "$config" "$export" "$draft_tokens")")
# vLLM needs all layers of a draft in one group of its KV cache, also where only some of them have a sliding window.
alike='import json, sys; sys.exit(len(set(json.load(open(sys.argv[1]))["spec"].get("layer_types", ()))) > 1)'
"${PYTHON:-python3}" -c "$alike" "$export/jeagle_export.json" || serve+=(--disable-hybrid-kv-cache-manager)
serve+=(${more[@]+"${more[@]}"})
start "${serve[@]}"
