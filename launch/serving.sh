# What serve_sglang.sh and serve_vllm.sh share: read by them, not run.

die() {
  echo "error: $*" >&2
  exit 2
}

show() { # the command, quoted so that a shell reads it back
  local line
  line="$(printf '%q ' "$@")"
  echo "${line% }"
}

# An export, ready to serve: checks --run, --export and --draft-tokens, and sets `export` and `target`.
# $1 is the folder that the engine's export has below exports/.
open_export() {
  local record read_record limits ref
  [[ -n "$run$export" ]] || die "--run is missing: give the run's folder, runs/NAME."
  [[ "$draft_tokens" =~ ^[1-9][0-9]*$ ]] || die "--draft-tokens is '$draft_tokens': it must be a whole number from 1."
  [[ -n "$export" ]] || export="$run/exports/$1"
  record="$export/jeagle_export.json"
  [[ -f "$record" ]] ||
    die "$export holds no export of jeagle's: run python converters/to_$1.py --checkpoint ${run:-RUN} first."

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
}

# Starts the command, or shows it where --print-only was given.
start() {
  if ((print_only)); then
    show "$@"
    exit 0
  fi
  exec "$@"
}
