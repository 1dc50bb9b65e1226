"""Compares the speculators library and SGLang with jeagle: their own classes load the exports."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from jeagle.errors import UserError
from jeagle.interfaces import DraftSpec
from jeagle.layers.rope import attention_factor, inverse_frequencies
from jeagle.run import assemble
from tests.serve import loss
from tests.serve.served import Served

HERE = Path(__file__).parent
LOSS_TOLERANCE = 1e-5
ROPE_TOLERANCE = 1e-4  # of a float32 cosine at ROPE_POSITION
ROPE_POSITION = 100


def speculators(python: Path, site: Path, served: Served, work: Path) -> dict[str, Any]:
    """Checks that the library loads the speculators layout, and that its forward pass gives jeagle's loss."""
    ours = loss.on_first_row(served.run)
    arrays = work / f"{served.name}.npz"
    np.savez(arrays, **ours.arrays)
    export = loadable(served.exports["speculators"], served.target, work / f"{served.name}-speculators")
    found = call(python, site, "in_speculators.py", export, arrays)
    wrong = [f"{name} was not loaded unchanged" for name in found["not_loaded"]]
    if found["counting"] != [round(c) for c in ours.counting]:
        wrong.append(f"slots that count: speculators {found['counting']}, jeagle {ours.counting}")
    if not abs(found["loss"] - ours.loss) <= LOSS_TOLERANCE * max(1.0, ours.loss):
        wrong.append(f"loss: speculators {found['loss']}, jeagle {ours.loss}")
    theirs = {name: found[name] for name in ("loss", "by_step")}
    return finding("speculators", served, "speculators", wrong, theirs, {"loss": ours.loss, "by_step": ours.by_step})


def loadable(export: Path, target: Path, out: Path) -> Path:
    """Returns the export itself where it names a target's folder that the library can read. Where the run's target is a
    package or a GGUF file, returns a copy that names the target's float32 folder."""
    config = json.loads((export / "config.json").read_text())
    verifier = config["speculators_config"]["verifier"]
    if (Path(verifier["name_or_path"]) / "config.json").is_file():
        return export
    verifier["name_or_path"] = str(target)
    shutil.copytree(export, out)
    (out / "config.json").write_text(json.dumps(config))
    return out


def sglang(python: Path, site: Path, served: Served) -> dict[str, Any]:
    """Checks that SGLang's draft class loads every tensor, and reads aux layers, vocabulary and RoPE as trained."""
    if isinstance(served.sglang, str):
        return finding("sglang", served, "plain", [], f"refused by jeagle: {served.sglang}", None)
    _, spec, _ = assemble.load_draft(served.run, "last")
    found = call(python, site, "in_sglang.py", served.sglang, served.target)
    wrong = [*found["wrong"], *(f"{name} is not used" for name in found["unused"])]
    if found["layers"] != list(spec.aux_layers):
        wrong.append(f"layers: SGLang {found['layers']}, jeagle {list(spec.aux_layers)}")
    reduced = spec.draft_vocab < spec.target_vocab
    if found["target_ids"] != (assemble.trained_vocabulary(served.run).tolist() if reduced else None):
        wrong.append("target ids: SGLang's are not the draft's")
    off = float(np.abs(np.array(found["rope"]) - cosines(spec)).max())
    if not off <= ROPE_TOLERANCE:
        wrong.append(f"RoPE: cosines differ by {off:.1e}")
    read = {"parameters": found["parameters"], "layers": found["layers"], "rope_off_by": off}
    return finding("sglang", served, "plain", wrong, read, {"layers": list(spec.aux_layers)})


def cosines(spec: DraftSpec) -> np.ndarray:
    """Returns the cosine of every pair of dimensions at `ROPE_POSITION`."""
    return np.cos(ROPE_POSITION * inverse_frequencies(spec.rope, spec.head_dim)) * attention_factor(spec.rope)


def call(python: Path, site: Path, program: str, *arguments: Path) -> dict[str, Any]:
    """Runs a script of this folder with `site` beside vLLM's packages, and returns its last line, parsed."""
    command = [python, "-P", HERE / program, *arguments]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{program} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def finding(engine: str, served: Served, layout: str, wrong: list[str], found: Any, ours: Any) -> dict[str, Any]:
    return {
        "engine": engine,
        "draft": served.name,
        "layout": layout,
        "fault": "",
        "as_it_should": not wrong,
        "found": found,
        "jeagle": ours,
        "differences": wrong,
    }
