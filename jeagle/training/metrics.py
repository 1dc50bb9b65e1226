"""What a run says of itself while it trains: figures a step late, skipped updates, what never moves, the FLOP share."""

from __future__ import annotations

import collections
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jeagle.config import RunConfig
from jeagle.errors import UserError
from jeagle.interfaces import Batch
from jeagle.runtime import distributed
from jeagle.runtime.chips import all_devices_flops
from jeagle.runtime.progress import Progress
from jeagle.runtime.trackers import Trackers, open_trackers
from jeagle.training.optimiser import learning_rate
from jeagle.training.step import Report

MOST_SKIPPED = 20
"""Updates skipped one after another at which a run stops: nothing would come of it any more."""


class Log:
    """Metrics to the trackers and the progress line, a step late, so that the device never waits for the host."""

    def __init__(
        self, config: RunConfig, start: int, steps: int, rows_of: Callable[[int], Iterable[int]] = lambda step: ()
    ):
        """`rows_of` tells the numbers of the rows of a step, for messages."""
        self.rows_of, self.folder = rows_of, config.folder
        self.every, self.steps = config.train.log_every, steps
        leader = distributed.is_leader()
        self.trackers = open_trackers(config.trackers, config.folder, start) if leader else Trackers([])
        self.progress = Progress(steps, "steps", "train")
        self.progress.update(start)
        self.rate = learning_rate(config.train, steps)
        self.pending: list[tuple[int, Report, int, float, float | None]] = []
        self.last = last_logged(config.folder)  # what a run that was finished before has to tell
        self.tokens, self.started = 0, time.monotonic()
        self.peak, self.speed = all_devices_flops(), Speed()
        self.skipped_in_a_row = 0

    def __enter__(self) -> Log:
        self.progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.progress.__exit__(*error)
        self.trackers.close()

    def step(self, step: int, report: Report, rows: Batch, flops: float = 0.0, read: float | None = None) -> None:
        """Takes a step's report; `flops` of the step, where they have been counted, and the share of its rows whose
        features were read, where some are read and others computed."""
        self.pending.append((step, report, int((rows.segments_BT > 0).sum()) * jax.process_count(), flops, read))
        if len(self.pending) > 1:
            self._take(*self.pending.pop(0))

    def say(self, text: str) -> None:
        """A line of its own on the screen, where there is anything to say."""
        if text:
            self.progress.say(text)

    def drain(self) -> None:
        while self.pending:
            self._take(*self.pending.pop(0))

    def _take(self, step: int, report: Report, tokens: int, flops: float, read: float | None) -> None:
        self.tokens += tokens
        metrics = dict(summarise(report), learning_rate=float(self.rate(step)), tokens_per_s=self._speed())
        if self.peak and flops:
            metrics["flops_share"] = self.speed.of(flops, time.monotonic()) / self.peak
        if read is not None:
            metrics["read_share"] = read
        self._watch(step, metrics)
        self.last = {"step": step + 1, **metrics}
        if (step + 1) % self.every == 0 or step + 1 == self.steps:
            self.trackers.log(step + 1, metrics)
        accuracy = " ".join(f"{metrics[k]:.2f}" for k in _accuracies(metrics))
        self.progress.update(
            step + 1,
            loss=metrics["loss"],
            accuracy=accuracy,
            E=metrics["expected_acceptance_length"],
            **{"tokens/s": metrics["tokens_per_s"]},
            **({"MFU": metrics["flops_share"]} if "flops_share" in metrics else {}),
            **({"read": f"{read:.0%}"} if read is not None else {}),
        )

    def _watch(self, step: int, metrics: dict[str, float]) -> None:
        """Says that an update was skipped, and stops a run that skips every one."""
        if metrics["taken"]:
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        why = "no slot of its rows counts" if not metrics["trained"] else f"loss {metrics['loss']:.3g}, gradient norm "
        why += f"{metrics['gradient_norm']:.3g}" if metrics["trained"] else ""
        rows = ", ".join(map(str, self.rows_of(step)))
        why += f", rows {rows}" if rows else ""
        self.progress.say(f"step {step + 1}: update skipped ({why}); {metrics['skipped']:.0f} so far")
        if self.skipped_in_a_row == MOST_SKIPPED:
            raise UserError(
                f"{MOST_SKIPPED} updates in a row were skipped, the last at step {step + 1} ({why}): lower "
                "--train.learning-rate or --train.clip, or look at the rows: python -m jeagle.preview "
                f"{self.folder} --start ROW."
            )

    def _speed(self) -> float:
        return self.tokens / max(time.monotonic() - self.started, 1e-6)


class Speed:
    """FLOP/s over the last few reports: compilation, and waiting for the first step, fall out of it."""

    def __init__(self, reports: int = 20):
        self._seen: collections.deque[tuple[float, float]] = collections.deque(maxlen=reports)

    def of(self, flops: float, now: float) -> float:
        """With a report of so many FLOPs at `now`; 0 until there are two."""
        self._seen.append((now, flops))
        since = now - self._seen[0][0]
        return sum(flops for _, flops in list(self._seen)[1:]) / since if since > 0 else 0.0


def last_logged(folder: Path) -> dict[str, Any]:
    """The last line of a run's metrics.jsonl; empty where there is none."""
    path = folder / "metrics.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    return json.loads(lines[-1]) if lines else {}


def _accuracies(metrics: dict[str, float]) -> Iterator[str]:
    return iter(sorted((k for k in metrics if k.startswith("accuracy_")), key=lambda k: int(k[9:])))


def summarise(report: Report) -> dict[str, float]:
    """Means of a step's figures: loss, accuracy and acceptance per draft position, and what they let expect.

    expected_acceptance_length is E = 1 + sum over k of the product of the greedy accuracies up to k; the sampled one,
    of the chances to be accepted when tokens are drawn, each trajectory's own product. trained: slots that carry loss.
    """
    report = jax.device_get(report)
    f = report.metrics
    accuracy = f.correct / np.maximum(f.counting, 1)
    accepted = f.accepted / np.maximum(f.trained, 1)
    metrics = {"loss": float(report.loss), "gradient_norm": float(report.gradient_norm)}
    metrics |= {f"loss_{k}": float(v) for k, v in enumerate(f.loss)}
    metrics |= {f"accuracy_{k}": float(v) for k, v in enumerate(accuracy)}
    metrics |= {f"acceptance_{k}": float(v) for k, v in enumerate(accepted)}
    metrics["expected_acceptance_length"] = float(1 + np.cumprod(accuracy).sum())
    reached = f.prefix_accepted / np.maximum(f.prefix_counting, 1)
    metrics["expected_acceptance_length_sampled"] = float(1 + reached.sum())
    metrics |= {"taken": float(report.taken), "skipped": float(report.skipped), "trained": float(f.trained.sum())}
    return metrics
