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

# Reads the options of both scripts into `run`, `export`, `target`, `draft_tokens` and `print_only`, and what follows --
# into `more`. What it does not know goes to the script's own_option.
read_options() {
  run="" export="" target="" draft_tokens=3 print_only=0
  while (($#)); do
    case "$1" in
      --run | --export | --target | --draft-tokens)
        [[ -n "${2-}" ]] || die "$1 needs a value."
        [[ "$2" != -* ]] || die "$1 is '$2', which begins with a dash: write a folder of that name as ./$2."
        local name="${1#--}"
        printf -v "${name//-/_}" '%s' "$2"
        shift 2
        ;;
      --print-only) print_only=1; shift ;;
      --help | -h) usage; exit 0 ;;
      --) shift; break ;;
      *)
        own_option "$1" ||
          die "there is no option $1; what the server is to get comes after --, and --help lists the options."
        shift
        ;;
    esac
  done
  more=("$@")
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
    -*) die "the export names the target '$target', which $engine would take for an option: give its folder or hub id as --target." ;;
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
