"""`python -m benchmarks.online --lengths 2048 4096 8192`: tokens/s and MFU of a whole training step, on what is here.

The step is `jeagle.train`'s own program: the frozen target's features, TTT steps with the platform's attention, loss,
gradients, AdamW, the state donated. The target's weights are random. With --draft-only the features are read, as a run
from a store reads them: the target makes them once, and leaves the devices before a step is timed.

A JSON object for each length, and at last one of all: seconds a step (least, and median of the steps after the first),
tokens/s, MFU of the FLOPs that are needed (`benchmarks.needed`, `benchmarks.tpu_needed`) and of those counted in the
jaxpr, by the bfloat16 peak of `jeagle/runtime/chips.py` (null where none is known, as for CPUs); step_bytes, what the
compiler allots on a device, and peak_bytes, the most that the process has had there so far; compile_s (a program that
lies in jax's cache is read, not compiled). Goals: 55 % MFU online, 50 % draft-only. A length that memory does not
suffice for says so, and the others run.

    python -m benchmarks.online --json                          # Llama-3.1-8B, bfloat16, everything supervised
    python -m benchmarks.online --weights fp8 --profile traces  # kernels kept as fp8; a trace, and what takes its time
    python -m benchmarks.online --draft-only
    python -m benchmarks.online --read runs/NAME/profile        # what takes the time of a training run's --profile 5
    python -m benchmarks.online --model tiny --lengths 64 --rows 2  # the same in seconds, on a CPU
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from benchmarks import trace
from benchmarks.command import begin
from benchmarks.step import slot_width
from benchmarks.timing import compiled, least
from benchmarks.whole_step import MODELS, WholeStep, batch_of, build
from benchmarks.works import Work
from jeagle.config import DraftConfig, MeshConfig, RunConfig, TargetConfig, TrainConfig
from jeagle.drafts import attention_backend
from jeagle.errors import UserError
from jeagle.features import StoredFeatures
from jeagle.runtime.cli import run as run_command
from jeagle.runtime.flops import all_devices_flops, count_flops
from jeagle.runtime.mesh import row_parts
from jeagle.training.setup import put_rows
from jeagle.training.step import StepReport, train_step

GOALS = {"online": 0.55, "draft_only": 0.50}  # MFU of needed FLOPs, on a GPU
TOKENS = 16384  # of a step
TRACED = 3  # steps of a profile


def measure(
    step: WholeStep, work: Work, kept: StoredFeatures | None, seconds: float, folder: Path | None
) -> dict[str, Any]:
    """Compiles the step for the work's rows, runs it, and tells what it costs.

    Args:
      kept: the rows' features, of a step without a target. folder: where a trace goes; None traces nothing.
    """
    width, (batch, stored) = slot_width(work, batch_of(work)), put_rows((batch_of(work), kept), step.mesh)
    state = step.start()
    traced = train_step.trace(step.program, step.optimiser, state, step.frozen, batch, width, stored)
    program, cost = compiled(traced.lower)

    def run() -> StepReport:
        nonlocal state
        state, report = program(state, step.frozen, batch, stored)
        jax.block_until_ready(state)
        return jax.device_get(report)

    first, times = least(run, seconds, "step")
    found = {"length": work.length, "rows": work.rows, "slots": width, "supervised": work.supervised}
    found |= {"first_loss": float(first.loss), "steps": times["steps"]}
    needed, counted = step.flops_needed(work), count_flops(traced.jaxpr)
    found |= speed(work.rows * work.length, needed, counted, times, step.mesh.size)
    found |= {"compile_s": cost["compile_s"]} | memory(program, step.mesh)
    return found | ({"profile": profile(run, program, folder)} if folder else {})


def speed(tokens: int, needed: float, counted: float, times: dict[str, float], devices: int) -> dict[str, Any]:
    """Tokens/s and MFU, by the median step."""
    median, peak = times["median_wall_s_per_step"], all_devices_flops()
    return {
        "wall_s_per_step": times["wall_s_per_step"],
        "median_wall_s_per_step": median,
        "tokens_per_s": tokens / median,
        "tokens_per_s_per_device": tokens / median / devices,
        "flops_needed": needed,
        "flops_counted": counted,
        "mfu_needed": peak and round(needed / median / peak, 4),
        "mfu_counted": peak and round(counted / median / peak, 4),
    }


def memory(program: Any, mesh: Any) -> dict[str, int | None]:
    """Bytes of the fullest device; peak_bytes null where a device does not say, as CPUs do not."""
    used = program.memory_analysis()
    own = used.output_size_in_bytes - used.alias_size_in_bytes  # the new state takes the old one's place
    stats = [device.memory_stats() or {} for device in mesh.local_devices]
    peaks = [peak for peak in (found.get("peak_bytes_in_use") for found in stats) if peak is not None]
    return {
        "step_bytes": used.argument_size_in_bytes + own + used.temp_size_in_bytes,
        "peak_bytes": max(peaks, default=None),
    }


def profile(run: Callable[[], Any], program: Any, folder: Path) -> dict[str, Any]:
    """What takes a few steps' time on the devices; the trace stays in `folder`."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # Python's own calls would crowd the trace
    with jax.profiler.trace(str(folder), profiler_options=options):
        for _ in range(TRACED):
            run()
    made_from = dict(re.findall(r'^\s*(?:ROOT )?%?([\w.-]+) = .*op_name="([^"]*)"', program.as_text(), re.MULTILINE))
    newest = trace.folders(folder)[-1]
    return {"folder": str(newest)} | trace.summary(trace.hosts(newest), made_from)


def within_memory(run: Callable[..., Any], *args: Any) -> Any:
    """What `run` returns, or why it had no room: {"out_of_memory": the first line of it}."""
    try:
        return run(*args)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"out_of_memory": str(error).splitlines()[0]}


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Every length in turn, printed as it is found; all of them with what they have in common."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):  # what building has to note: a kernel that is not trusted
        step = build(config_of(args), MODELS[args.model])
    parts, reads, found = row_parts(step.mesh), {}, []
    works = [step.work(rows_of(args, length, parts), length, args.supervised) for length in args.lengths]
    if args.draft_only:
        reads = {work: within_memory(step.read, work) for work in works}
        step = step.without_target()
    for work in works:
        kept, folder = reads.get(work), Path(args.profile, f"T{work.length}") if args.profile else None
        no_room = kept if isinstance(kept, dict) else None
        one = no_room or within_memory(measure, step, work, kept, args.seconds, folder)
        found.append({"length": work.length, "rows": work.rows} | one)
        tell(found[-1], args.json)
    wanted, used = attention_backend(step.mesh), step.program.attention
    shared = {
        "step": "draft_only" if args.draft_only else "online",
        "device": step.mesh.devices.flat[0].device_kind,
        "devices": step.mesh.size,
        "mesh": dict(step.mesh.shape),
        "jax": jax.__version__,
        "attention": used,
        "kernel_refused": used != wanted,
        "notes": said.getvalue().strip(),
        "goal_mfu_needed": GOALS,
    }
    return {name: getattr(args, name) for name in ("model", "dtype", "weights", "remat")} | shared | {"lengths": found}


def tell(found: dict[str, Any], as_json: bool) -> None:
    """Prints what a length has given; its profile as a table, unless all is to be JSON."""
    if as_json or "profile" not in found:
        return print(json.dumps(found), flush=True)
    print(json.dumps({name: figure for name, figure in found.items() if name != "profile"}))
    print(f"{found['profile']['folder']}\n{trace.table(found['profile'])}", flush=True)


def config_of(args: argparse.Namespace) -> RunConfig:
    """The run whose step it is."""
    axes = dict(axis.partition("=")[::2] for axis in args.mesh.split(","))
    known = all(name in MeshConfig.__dataclass_fields__ and re.fullmatch(r"-1|\d+", axes[name]) for name in axes)
    if not known:
        raise UserError(f"--mesh {args.mesh}: name axes and sizes, as in fsdp=4,tensor=2 or fsdp=-1.")
    return RunConfig(
        "online",
        target=TargetConfig(dtype=args.dtype, weights=args.weights),
        draft=DraftConfig(ttt_steps=args.ttt_steps),
        train=TrainConfig(dtype=args.dtype, remat=args.remat),
        mesh=MeshConfig(**{"fsdp": 1} | {name: int(size) for name, size in axes.items()}),
    )


def rows_of(args: argparse.Namespace, length: int, parts: int) -> int:
    """--rows, or as many as make `TOKENS`; a multiple of the parts that the mesh splits them into."""
    if args.rows % parts:
        raise UserError(f"--rows {args.rows}: the mesh {args.mesh} splits rows into {parts} parts: give a multiple.")
    return args.rows or -(-max(TOKENS // length, 1) // parts) * parts


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama-3.1-8b")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192], help="T")
    parser.add_argument("--rows", type=int, default=0, help=f"B, of every length; without it {TOKENS} tokens a step")
    parser.add_argument("--supervised", type=float, default=1.0, help="share of the tokens that are learnt")
    parser.add_argument("--draft-only", action="store_true", help="features are read, as from a store")
    parser.add_argument("--ttt-steps", type=int, default=DraftConfig().ttt_steps, help="K")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of matrix products")
    parser.add_argument("--weights", choices=["dtype", "int8", "fp8"], default="dtype", help="as --target.weights")
    parser.add_argument("--mesh", default="fsdp=-1", help="axes: data, fsdp, expert, tensor; -1 = the rest")
    parser.add_argument("--remat", action="store_true", help="make the TTT steps' products anew in the backward pass")
    parser.add_argument("--seconds", type=float, default=20.0, help="of steps of each length")
    parser.add_argument(
        "--profile", metavar="DIR", help=f"trace {TRACED} steps of each length, and say what takes them"
    )
    parser.add_argument("--read", metavar="DIR", help="measure nothing: what takes the time of the traces below DIR")
    parser.add_argument("--json", action="store_true", help="print nothing but JSON")
    args = begin(parser, arguments)
    if args.read:
        for folder in trace.folders(Path(args.read)):
            found = {"folder": str(folder)} | trace.summary(trace.hosts(folder))
            print(json.dumps(found) if args.json else f"{folder}\n{trace.table(found)}", flush=True)
    else:
        print(json.dumps(measured(args)))


if __name__ == "__main__":
    run_command(main)
