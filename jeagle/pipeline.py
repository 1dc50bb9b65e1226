"""`python -m jeagle.pipeline --config FILE`: answers, rows, training, measurement, exports and a report, in one call.

Each stage leaves a note of what it was made from and of the files that it wrote; a second call takes what is still true
and there, and makes the rest. --fresh moves the run to NAME.1, or the next number that is free, and starts anew.
"""

import dataclasses
import gc
import hashlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jeagle
from jeagle import data, decoding, flags, targets
from jeagle.config import RunConfig, to_json
from jeagle.errors import UserError
from jeagle.export import ENGINES, export
from jeagle.exporting.run_reader import ACCEPTANCE_METRICS
from jeagle.report import mean_logged, summary_lines, write_report
from jeagle.run import acceptance, assemble, resume
from jeagle.run.answers import RegenerateArguments, regenerate
from jeagle.run.claim import NOTE, claimed
from jeagle.run.dataset import check_unchanged, describe, prepare
from jeagle.run.draft_init import EMBEDDING_FILE, draft_spec
from jeagle.runtime.checkpoints import load_named
from jeagle.runtime.cli import run
from jeagle.runtime.host import prepare_host
from jeagle.runtime.manifest import atomic_write, file_fingerprint, fingerprint, finished_manifest, set_aside
from jeagle.runtime.outputs import check_output
from jeagle.train import train
from jeagle.training.setup import check_run, start_anew


def main(arguments: list[str]) -> None:
    live = ("--regenerate.live", "True")
    arguments = [part for argument in arguments for part in (live if argument == "--live" else (argument,))]
    fresh, arguments = flags.take_fresh(arguments)
    program = f"python -m jeagle.pipeline [{flags.FRESH}]"
    config = flags.from_command_line(arguments, program=program, description=__doc__)
    prepare_host()
    if fresh:
        start_anew(config)
    with claimed(config):
        for line in pipeline(config):
            print(line)


def pipeline(config: RunConfig) -> list[str]:
    """All stages of a run; returns the lines that sum it up."""
    stages = Stages(config.folder / "stages")
    file = config.folder / ("answers.jsonl" if config.regenerate.live else "answers_check.jsonl")
    _check_first(config)
    settings, target = to_json(config), targets.resolve(config.target.ref).fingerprint
    answered_from = {"regenerate": settings["regenerate"], "target": settings["target"] | {"ref": target}}
    answered_from |= {"starter": config.data.source == "starter", "system_prompt": config.data.system_prompt}
    answers = stages("answers", answered_from, lambda: _answers(config, file), lambda made: [file] if made else [])
    if answers and config.regenerate.live:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=str(file)))
    started = time.monotonic()
    prepared = prepare(config)
    stages.seconds["prepare"] = time.monotonic() - started
    print("\n".join(describe(prepared)), flush=True)
    inputs = {"data": finished_manifest(prepared.data)["made_from"], "tables": finished_manifest(prepared.tables)}
    begun_from = inputs | {"target": target} | resume.decisive(config, resume.RUN)
    bench_settings = {"bench": settings["bench"]}
    before = stages("measure before", begun_from | bench_settings, lambda: _measure(config, prepared, trained=False))
    trained_from = begun_from | resume.decisive(config, resume.RUN, resume.TOLD)
    begun = stages.made("train", trained_from)
    training = stages(
        "train",
        trained_from,
        lambda: _train(config, begun),
        lambda made: [  # what measuring and exporting read
            *(config.folder / name for name in ("config.json", "draft.json", EMBEDDING_FILE)),
            config.folder / "checkpoints" / str(made["step"]),
        ],
    )
    measured_from = trained_from | bench_settings | {"parameters": training["parameters"]}
    after = stages("measure after", measured_from, lambda: _measure(config, prepared, trained=True))
    exports = stages(
        "export",
        measured_from | {"acceptance": after},
        lambda: _export(config, after),
        lambda made: [config.folder / "exports" / engine for engine in made["engines"]],
    )
    report = _report(config, prepared.statistics, answers, before, training, after, exports, stages.seconds)
    page = write_report(config.folder, report, after["sample"])
    return [*summary_lines(report), f"report: {page}"]


def _check_first(config: RunConfig) -> None:
    """UserError for what can be refused before the first stage, while nothing of an existing run has been touched."""
    damaged = resume.is_damaged(config.folder)  # the train stage says what becomes of it
    if not damaged:
        resume.check_settings(config)
        if not config.regenerate.live:
            check_unchanged(config)
    check_run(config, anew=damaged)


def _answers(config: RunConfig, out: Path) -> dict[str, Any]:
    """Makes the starter answers anew (--regenerate.live), or some of them to compare; nothing for a user's own data."""
    if config.data.source != "starter" or not (config.regenerate.check or config.regenerate.live):
        return {}
    shipped = {c["id"]: c for c in data.read_rows(data.starter_answers())}
    prompts = [p for p in data.read_prompts("starter") if p["id"] in shipped]
    settings = ["max_new_tokens", "batch"]  # as the shipped ones were made: rounding depends on shapes
    if config.regenerate.live:
        settings += ["temperature", "top_p", "top_k", "seed"]
    else:  # the shipped ones, which a check compares with, are greedy
        prompts = prompts[: config.regenerate.check]
    args = RegenerateArguments(
        target=config.target.ref,
        out=out,
        system_prompt=config.data.system_prompt,
        **{name: getattr(config.target, name) for name in ("dtype", "weights", "family")},
        **{name: getattr(config.regenerate, name) for name in settings},
    )
    made = regenerate(args, prompts)
    same = sum(row["messages"][-1]["content"] == shipped[row["id"]]["messages"][-1]["content"] for row in made)
    print(f"regenerated {len(made)} answers: {same} are the shipped ones to the letter", flush=True)
    return {"agree": f"{same}/{len(made)}"}


def _train(config: RunConfig, begun: bool) -> dict[str, Any]:
    """Trains, or goes on from the last checkpoint that can be read; the figures, and a hash of the draft's parameters.

    Args:
      begun: a note says that the run was begun with these very settings, so that what is damaged of those that lie
        beside the checkpoints can be written anew.
    """
    _set_damaged_aside(config.folder, begun)
    if not begun:
        assemble.check_files(config.folder)
    metrics = train(config)
    _, _, params = assemble.load_draft(config.folder, "last")
    digest = hashlib.sha256()  # training again may give the same draft, or another
    for name in sorted(params):
        array = np.ascontiguousarray(params[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return metrics | {"parameters": digest.hexdigest()[:16]}


def _set_damaged_aside(folder: Path, begun: bool) -> None:
    """Renames the newest checkpoints that cannot be read, and with `begun` the run's own small files, so that training
    makes them again. Nothing is removed."""
    small = ("config.json", "draft.json", EMBEDDING_FILE) if begun else ()
    for path in (folder / name for name in small):
        if path.is_file() and not _readable(path):
            _set_aside(path, folder, path.name)
    numbers = [path for path in folder.glob("checkpoints/*") if path.name.isdigit()]
    for path in sorted(numbers, key=lambda path: -int(path.name)):
        if _readable(path):
            break
        _set_aside(path, folder, f"checkpoint_{path.name}")


def _readable(path: Path) -> bool:
    """Whether a checkpoint, an array or a file with a JSON object can be read."""
    try:
        if path.is_dir():
            load_named(path.parent, path.name)
        elif path.suffix == ".npy":
            np.load(path)
        else:
            return isinstance(json.loads(path.read_text("utf-8")), dict)
        return True
    except MemoryError:
        raise
    except Exception:  # numpy, JSON, Orbax and what lies below it raise many kinds for a damaged file
        return False


def _set_aside(path: Path, folder: Path, name: str) -> None:
    place = set_aside(path, folder, name)
    print(f"warning: {path} cannot be read: it was moved to {place}, and is made again", flush=True)


def _measure(config: RunConfig, prepared: Any, *, trained: bool) -> dict[str, Any]:
    """Acceptance on held-out prompts, before or after training; after, the n-gram baseline and a sample too."""
    folder, settings = config.folder, config.bench
    loaded = assemble.load_target(config, assemble.mesh_of(config), dtype="float32")
    params, start = None, None
    if trained:
        _, spec, params = assemble.load_draft(folder, "last")
    else:
        size, start = len(data.load_tables(prepared.tables)), assemble.open_start(config)
        spec = draft_spec(config, loaded.target.spec, size, loaded.end_token_ids, start)
    opened = acceptance.open_bench(config, spec, folder, params, loaded=loaded, start=start)
    prompts = acceptance.prompt_ids(opened, config, folder, None, settings.max_prompts)
    chosen = prompts if trained else prompts[: settings.prompts_before]
    how = decoding.Decoding(decoding.TreeShape(settings.draft_tokens))
    sizes = {"max_new_tokens": settings.max_new_tokens, "batch": settings.batch}
    width = decoding.padded_width(prompts)
    report, decoded = acceptance.measure(opened, chosen, how=how, **sizes, width=width, label="measure")
    report["draft_parameters"] = sum(int(np.prod(x.shape)) for x in assemble.flat_draft(opened.weights.draft).values())
    if trained:
        report |= acceptance.measure_baselines(folder, chosen, decoded, how.shape)
        report["sample"] = _sample(config, loaded.tokenizer, decoded)
    return report


def _sample(config: RunConfig, tokenizer: Any, decoded: acceptance.Decoded) -> dict[str, Any]:
    """The answer whose acceptance is the median one, token by token: by the target, or drafted and accepted."""
    rate = [len(m.tokens) / max(len(m.rounds), 1) if len(m.tokens) >= 24 else 0.0 for m in decoded.speculative]
    whole = [i for i in np.argsort(rate, kind="stable") if rate[i]] or [0]
    chosen = int(whole[len(whole) // 2])
    answer = decoded.speculative[chosen]
    sources = [("target", 0)]
    for number, accepted in enumerate(answer.rounds, 1):
        sources += [("draft", number)] * accepted + [("target", number)]
    tokens, shown = [], ""
    for end, (source, number) in enumerate(sources[: len(answer.tokens)], 1):
        # What each token adds to the text; a character spread over several tokens comes with its last one.
        text = tokenizer.decode(answer.tokens[:end]).removesuffix("\ufffd")
        tokens.append({"text": text[len(shown) :], "source": source, "round": number})
        shown = text
    prompt = data.read_prompts(str(config.folder / "data" / "held_out.jsonl"))[chosen]["messages"][-1]["content"]
    return {"prompt": prompt, "tokens": tokens}


def _export(config: RunConfig, after: dict[str, Any]) -> dict[str, Any]:
    acceptance = {name: after[name] for name in ACCEPTANCE_METRICS}
    engines, refused = [], {}
    for engine, arguments in ENGINES.items():
        try:
            print(export(arguments(str(config.folder)), acceptance), flush=True)
            engines.append(engine)
        except UserError as error:
            refused[engine] = str(error)
            print(f"no export for {engine}: {error}", file=sys.stderr)
    if not engines:
        raise UserError(next(iter(refused.values())))
    return {"engines": engines, "refused": refused}


def _report(config, statistics, answers, before, training, after, exports, seconds) -> dict[str, Any]:
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    same = ("draft_parameters", "acceptance_by_position", "prompts_measured", "draft_tokens", "max_new_tokens")
    lengths = {"before": before, "after": after, "ngram": after["ngram"]}
    return {
        "target": config.target.ref,
        "draft_vocab": statistics["draft_vocab"],
        "vocab_coverage_train": statistics["coverage_train"],
        "vocab_coverage_held_out": statistics["coverage_held_out"],
        "train_tokens": statistics["train"]["tokens"],
        "supervised_tokens": statistics["train"]["supervised_tokens"],
        "steps": training["step"],
        "read_share": mean_logged(config.folder, "read_share"),
        **{f"acceptance_length_{kind}": measured["acceptance_length"] for kind, measured in lengths.items()},
        **{name: after[name] for name in (*same, "prompts_hash")},
        "acceptance_by_position_before": before["acceptance_by_position"],
        "acceptance_by_position_ngram": after["ngram"]["acceptance_by_position"],
        "lossless": before["lossless"] and after["lossless"],
        "excused_ties": before["excused_ties"] + after["excused_ties"],
        "prompts_measured_before": before["prompts_measured"],
        "exports": {engine: str(config.folder / "exports" / engine) for engine in exports["engines"]},
        "regenerated_agree": answers.get("agree"),
        "stage_seconds": {name: round(value, 1) for name, value in seconds.items()},
        "peak_rss_bytes": usage * (1 if sys.platform == "darwin" else 1024),
        "versions": {"jeagle": jeagle.__version__, "jax": jax.__version__},
    }


class Stages:
    """Runs a stage, or takes its result from the note that it left when it was last made from the same things.

    The note also names every file of the stage, with a hash of its bytes (about a second a GB): where one has gone or
    changed, the stage is made again.
    """

    def __init__(self, folder: Path):
        """`folder`, in the run's folder, is where the notes lie; those of another version of jeagle no longer count."""
        self.folder, self.seconds = folder, dict[str, float]()

    def __call__(
        self,
        name: str,
        made_from: dict[str, Any],
        make: Callable[[], dict[str, Any]],
        files: Callable[[dict[str, Any]], Iterable[Path]] = lambda result: (),
    ) -> dict[str, Any]:
        """The stage's result.

        Args:
          made_from: what the result follows from; compared by its fingerprint.
          make: makes the result, which JSON can hold, and the files.
          files: result -> the files and folders in the run's folder that the stage wrote.
        """
        check_output(self._path(name), NOTE)
        old = self._note(name, made_from)
        if old and self._look(files(old["result"])) == old["files"]:
            print(f"[{name}] as before", flush=True)
            self.seconds[name] = old["seconds"]
            return old["result"]
        print(f"[{name}]", flush=True)
        started = time.monotonic()
        result = make()
        self.seconds[name] = round(time.monotonic() - started, 1)
        tree = {"made_from": self._made_from(made_from), "seconds": self.seconds[name], "result": result}
        tree["files"] = self._look(files(result))
        atomic_write(self._path(name), json.dumps(tree, indent=1) + "\n", NOTE)
        gc.collect()  # a model that the stage held must not stay beside the next one's
        return result

    def made(self, name: str, made_from: dict[str, Any]) -> bool:
        """Whether the stage was made from these things once, whatever has become of its files."""
        return self._note(name, made_from) is not None

    def _path(self, name: str) -> Path:
        return self.folder / f"{name.replace(' ', '_')}.json"

    def _note(self, name: str, made_from: dict[str, Any]) -> dict[str, Any] | None:
        """The note of a stage that was made from these things; None without one, or where it is damaged."""
        try:
            note = json.loads(self._path(name).read_text("utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        wanted = {"made_from": self._made_from(made_from), "seconds": 0.0, "result": {}, "files": {}}
        if not isinstance(note, dict) or any(type(note.get(n)) is not type(value) for n, value in wanted.items()):
            return None
        return note if note["made_from"] == wanted["made_from"] else None

    def _made_from(self, made_from: dict[str, Any]) -> dict[str, str]:
        return {"version": jeagle.__version__, "from": fingerprint(made_from)}

    def _look(self, paths: Iterable[Path]) -> dict[str, str]:
        """Hashes of all files at or below `paths`, by their path in the run's folder; empty for a missing one."""
        found: dict[str, str] = {}
        for path in paths:
            below = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
            found |= {os.path.relpath(p, self.folder.parent): file_fingerprint(p) if p.is_file() else "" for p in below}
        return found


if __name__ == "__main__":
    run(main)
