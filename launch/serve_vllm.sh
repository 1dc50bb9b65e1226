#!/usr/bin/env bash
# Starts vLLM with a run's draft.
set -euo pipefail

usage() {
  cat <<'HELP'
Usage: launch/serve_vllm.sh --run RUN [--export DIR] [--target REF] [--draft-tokens N] [--print-only] [-- OPTIONS...]

Starts vLLM's server with a run's target and the draft that converters/to_vllm.py exported. A draft that vLLM cannot
serve as it was trained is refused.

  --run RUN          folder of the run, runs/NAME
  --export DIR       folder of the export (default: RUN/exports/vllm)
  --target REF       folder or hub id of the target (default: the target that the export names)
  --draft-tokens N   number of tokens that are drafted before each verification (default 3)
  --print-only       print the command without starting it
  --help             show this text

Options after -- are passed on to the server, such as -- --port 8000 --max-model-len 8192.

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
