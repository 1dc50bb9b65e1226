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

die() {
  echo "error: $*" >&2
  exit 2
}

show() { # the command, quoted so that a shell reads it back
  local line
  line="$(printf '%q ' "$@")"
  echo "${line% }"
}

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
[[ -n "$run$export" ]] || die "--run is missing: give the run's folder, runs/NAME."
[[ "$draft_tokens" =~ ^[1-9][0-9]*$ ]] || die "--draft-tokens is '$draft_tokens': it must be a whole number from 1."
[[ -n "$export" ]] || export="$run/exports/sglang"
record="$export/jeagle_export.json"
[[ -f "$record" ]] ||
  die "$export holds no export of jeagle's: run python converters/to_sglang.py --checkpoint ${run:-RUN} first."

# Why the engine would not serve the folder, and the target's reference, a line each.
read_record='import json, sys; r = json.load(open(sys.argv[1])); print("; ".join(r["limits"][sys.argv[2]]));
print(r["target"]["ref"] or "")'
{ read -r limits && read -r ref; } < <("${PYTHON:-python3}" -c "$read_record" "$record" "$engine" 2>/dev/null) ||
  die "$record cannot be read: export the run again."
[[ -z "$limits" ]] || die "$engine does not serve $export as it was trained: $limits."
[[ -n "$target" ]] || target="$ref"
case "$target" in
  "" | pypi:* | *.gguf) die "$engine cannot load the target '$target': give its safetensors folder or hub id as --target." ;;
esac

serve=(python -m "$module.launch_server" --model-path "$target" --speculative-algorithm EAGLE3)
serve+=(--speculative-draft-model-path "$export" --speculative-num-steps "$draft_tokens" --speculative-eagle-topk 1)
serve+=(--speculative-num-draft-tokens "$((draft_tokens + 1))" "$@")
if ((print_only)); then
  show "${serve[@]}"
  exit 0
fi
exec "${serve[@]}"
