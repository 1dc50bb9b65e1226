"""Time and memory of exporting a draft of an 8B target's shape, each export in a fresh process.

    python -m benchmarks.export [--folder DIR] [--width 4096 --mlp-width 14336 --vocab 128256 --draft-vocab 32000]

Writes a run with random parameters (float32, 1.7 GB as it stands) and its target's embedding (bfloat16, 1.1 GB) into a
folder that goes again, and calls converters/to_sglang.py and to_vllm.py on it, with the check that reads the export
back. Prints JSON: for each the wall and processor seconds, and the process's peak memory (VmHWM, the interpreter and
JAX included) over the bytes written. Compares with nothing: the law is under 30 s, and under 1.5 times the draft's
bytes. A first export that is not counted brings the files into the page cache, as they are after training.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

ROOT = Path(__file__).parents[1]
CASES = {
    "to_sglang.py, bfloat16": ("to_sglang.py",),
    "to_sglang.py, bfloat16, --no-check": ("to_sglang.py", "--no-check"),
    "to_vllm.py, bfloat16": ("to_vllm.py",),
    "to_vllm.py, bfloat16, --embedding none": ("to_vllm.py", "--embedding", "none"),
    "to_vllm.py, float32": ("to_vllm.py", "--dtype", "float32"),
}


def main() -> None:
    options = _options()
    if options.write:
        write_run(Path(options.write), options)
        return
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="export-") as made:
        run = Path(made) / "run"
        arguments = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in _SIZES]
        subprocess.run([sys.executable, "-m", "benchmarks.export", f"--write={run}", *arguments], check=True, cwd=ROOT)
        trained = json.loads((run / "bytes.json").read_text())
        found: dict[str, Any] = {"draft_bytes_float32": trained}
        _export(run, Path(made) / "out", "to_vllm.py")
        for name, arguments in CASES.items():
            found[name] = _export(run, Path(made) / "out", *arguments)
    print(json.dumps(found, indent=1))


_SIZES = {"width": 4096, "mlp_width": 14336, "vocab": 128256, "draft_vocab": 32000, "layers": 32}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="a place with room for 7 GB")
    parser.add_argument("--write", help=argparse.SUPPRESS)
    for name, size in _SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size)
    return parser.parse_args()


def _export(run: Path, out: Path, converter: str, *options: str) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "converters" / converter), f"--checkpoint={run}", f"--out={out}"]
    shutil.rmtree(out, ignore_errors=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    process = subprocess.Popen([*command, *options], env=environment, stdout=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, _peak(process.pid))
        time.sleep(0.02)
    wall, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise SystemExit(process.returncode)
    written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    return {
        "said": process.stdout.read().strip().partition(": ")[2] if process.stdout else "",
        "seconds": round(wall, 1),
        "processor_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "peak_bytes": peak,
        "written_bytes": written,
        "peak_over_written_bytes": round(peak / written, 3),
    }


def _peak(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def write_run(folder: Path, options: argparse.Namespace) -> None:
    """A run's folder with a checkpoint of random parameters, and as much of its target as an export reads."""
    from jeagle import data, exchange
    from jeagle import flags as configs
    from jeagle.config import RunConfig, TargetConfig
    from jeagle.interfaces import DraftSpec, Rope
    from jeagle.run import assemble
    from jeagle.runtime.checkpoints import Checkpoints
    from jeagle.runtime.mesh import make_mesh
    from jeagle.training.step import TrainState

    heads = options.width // 128
    spec = DraftSpec(
        target_width=options.width,
        width=options.width,
        target_vocab=options.vocab,
        draft_vocab=options.draft_vocab,
        aux_layers=(2, options.layers // 2, options.layers - 3),
        heads=heads,
        kv_heads=max(heads // 4, 1),
        head_dim=128,
        mlp_width=options.mlp_width,
        rope=Rope(500000.0),
        max_positions=131072,
    )
    folder.mkdir(parents=True)
    target = _write_target(folder.parent / "target", spec, options.layers)
    config = RunConfig(name=folder.name, runs=str(folder.parent), target=TargetConfig(ref=str(target)))
    (folder / "config.json").write_text(json.dumps(configs.to_json(config)))
    ids = np.sort(np.random.default_rng(0).permutation(options.vocab)[: options.draft_vocab])
    data.save_tables(folder / "tables", np.zeros(options.vocab, np.int64), ids, {})
    tables = json.loads((folder / "tables" / "manifest.json").read_text())
    (folder / "draft.json").write_text(json.dumps({"draft": spec.to_json(), "made_from": {"tables": tables}}))
    rng = np.random.default_rng(0)
    params = {n: rng.standard_normal(s, np.float32) * 0.02 for n, s in exchange.expected_shapes(spec).items()}
    _, draft = assemble.draft_from_flat(spec, "float32", params, make_mesh())
    checkpoints = Checkpoints(folder / "checkpoints", keep=1)
    checkpoints.save(1, TrainState(draft, None, np.int32(1), np.int32(0)))
    checkpoints.close()
    (folder / "bytes.json").write_text(str(sum(array.nbytes for array in params.values())))


def _write_target(folder: Path, spec: Any, layers: int) -> Path:
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder.mkdir()
    tree = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": spec.width,
        "intermediate_size": spec.mlp_width,
        "num_hidden_layers": layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "vocab_size": spec.target_vocab,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": spec.max_positions,
    }
    (folder / "config.json").write_text(json.dumps(tree))
    rows = np.random.default_rng(1).standard_normal((spec.target_vocab, spec.width), np.float32)
    save_file({"model.embed_tokens.weight": rows.astype(ml_dtypes.bfloat16)}, folder / "model.safetensors")
    words = Tokenizer(models.WordLevel({"a": 0, "?": 1, "<end>": 2}, unk_token="?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
