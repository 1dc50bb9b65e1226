# Functions of serve_sglang.sh and serve_vllm.sh, which source this file.

die() {
  echo "error: $*" >&2
  exit 2
}

show() { # prints a command, quoted for a shell
  local line
  line="$(printf '%q ' "$@")"
  echo "${line% }"
}

# Reads the options of both scripts into `run`, `export`, `target`, `draft_tokens` and `print_only`, and the arguments
# after -- into `more`. Options that it does not know are passed to the script's own_option.
read_options() {
  run="" export="" target="" draft_tokens=3 print_only=0
  while (($#)); do
    case "$1" in
      --run | --export | --target | --draft-tokens)
        [[ -n "${2-}" ]] || die "$1 needs a value."
        [[ "$2" != -* ]] || die "$1 is '$2', which begins with a dash. Write a folder of that name as ./$2."
        local name="${1#--}"
        printf -v "${name//-/_}" '%s' "$2"
        shift 2
        ;;
      --print-only) print_only=1; shift ;;
      --help | -h) usage; exit 0 ;;
      --) shift; break ;;
      *)
        own_option "$1" ||
          die "there is no option $1. Put options of the server after --; --help lists the options."
        shift
        ;;
    esac
  done
  more=("$@")
}

# Checks --run, --export and --draft-tokens, and that the engine serves the export. Sets `export` and `target`.
# $1 is the name of the engine's export in exports/.
open_export() {
  local record read_record limits ref
  [[ -n "$run$export" ]] || die "--run is missing. Give the folder of the run, runs/NAME."
  [[ "$draft_tokens" =~ ^[1-9][0-9]*$ ]] || die "--draft-tokens is '$draft_tokens'; it must be a whole number from 1 on."
  [[ -n "$export" ]] || export="$run/exports/$1"
  record="$export/jeagle_export.json"
  [[ -f "$record" ]] ||
    die "$export is not an export of jeagle. Run python converters/to_$1.py --checkpoint ${run:-RUN} first."

  # Reads two lines: why the engine cannot serve the export, and the target's reference.
  read_record='import json, sys; r = json.load(open(sys.argv[1])); print("; ".join(r["limits"][sys.argv[2]]));
print(r["target"]["ref"] or "")'
  { read -r limits && read -r ref; } < <("${PYTHON:-python3}" -c "$read_record" "$record" "$engine" 2>/dev/null) ||
    die "$record cannot be read. Export the run again."
  [[ -z "$limits" ]] || die "$engine cannot serve $export as it was trained: $limits."
  [[ -n "$target" ]] || target="$ref"
  case "$target" in
    -*) die "the export names the target '$target', which $engine would read as an option. Give its folder or hub id as --target." ;;
    "" | pypi:* | *.gguf) die "$engine cannot load the target '$target'. Give its safetensors folder or hub id as --target." ;;
  esac
}

# Starts the command, or prints it with --print-only.
start() {
  if ((print_only)); then
    show "$@"
    exit 0
  fi
  exec "$@"
}
