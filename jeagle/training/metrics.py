"""The metrics of training, a step late; skipped updates, unchanged parameters, the share of the peak FLOPs."""

import collections
import time
from collections.abc import Callable, Iterable
from typing import Any, Self

import jax
import numpy as np

from jeagle.config import RunConfig
from jeagle.errors import UserError
from jeagle.interfaces import Batch
from jeagle.run import assemble
from jeagle.run.parameters import Trained, path_names
from jeagle.runtime import distributed
from jeagle.runtime.checksums import checksum
from jeagle.runtime.flops import all_devices_flops, count_flops
from jeagle.runtime.progress import Progress
from jeagle.runtime.trackers import Trackers, open_trackers, read_metrics
from jeagle.training.optimiser import learning_rate
from jeagle.training.setup import Run, StepBatch
from jeagle.training.step import StepReport

MOST_SKIPPED = 20
"""Updates skipped one after another at which a run stops: nothing would come of it any more."""


class MetricsLog:
    """Metrics to the trackers and the progress line, a step late, so that the device never waits for the host.

    Args:
      start, steps: the step that this call begins with, and how many the run has.
      rows_of: step -> the numbers of its rows, for messages.
      check_target: called with the rows of a batch whose loss or gradient is not finite.
    """

    def __init__(
        self,
        config: RunConfig,
        start: int,
        steps: int,
        rows_of: Callable[[int], Iterable[int]] = lambda step: (),
        check_target: Callable[[Batch], None] = lambda rows: None,
    ):
        self.check_target = check_target
        self.rows_of, self.folder = rows_of, config.folder
        self.every, self.steps = config.train.log_every, steps
        leader = distributed.is_leader()
        self.trackers = open_trackers(config.trackers, config.folder, start) if leader else Trackers([])
        self.progress = Progress(steps, "steps", "train", done=start)
        self.rate = learning_rate(config.train, steps)
        self.pending: list[tuple[StepBatch, StepReport, float]] = []
        self.last = (read_metrics(config.folder) or [{}])[-1]  # of a run that was finished before
        self.tokens, self.started = 0, time.monotonic()
        self.peak, self.speed = all_devices_flops(), Speed()
        self.flops: dict[tuple[int, bool], float] = {}
        self.skipped_in_a_row = 0
        self.unchanged: UnchangedParameters | None = None

    @classmethod
    def of(cls, run: Run, draft: Any, start: int) -> Self:
        """The log of a run that goes on with step `start` from the parameters `draft`."""
        log = cls(run.config, start, run.steps, run.stream.row_numbers, run.check_target)
        if run.config.train.learning_rate:
            log.unchanged = UnchangedParameters(draft, assemble.trained(run.config.draft), start)
        return log

    def __enter__(self) -> Self:
        self.progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.progress.__exit__(*error)
        self.trackers.close()

    def count_flops(self, step: Any, arguments: tuple[Any, ...]) -> float:
        """FLOPs of a jitted step, counted once for each shape; 0 where the devices' peak is not known."""
        *_, width, stored = arguments
        shape = width, stored is None
        if self.peak and shape not in self.flops:
            self.flops[shape] = count_flops(step.trace(*arguments).jaxpr)
        return self.flops.get(shape, 0.0)

    def step(self, batch: StepBatch, report: StepReport, draft: Any = None, flops: float = 0.0) -> None:
        """Takes the report of the step that read `batch`, and the parameters after it."""
        if self.unchanged:
            self.say(self.unchanged.after(batch.step, draft))
        self.pending.append((batch, report, flops))
        if len(self.pending) > 1:
            self._take(*self.pending.pop(0))

    def say(self, text: str) -> None:
        """Prints a line of its own above the progress line, if `text` is not empty."""
        if text:
            self.progress.say(text)

    def drain(self) -> None:
        """Logs the steps that are not logged yet."""
        while self.pending:
            self._take(*self.pending.pop(0))

    def _take(self, batch: StepBatch, report: StepReport, flops: float) -> None:
        step = batch.step
        self.tokens += batch.tokens
        tokens_per_s = self.tokens / max(time.monotonic() - self.started, 1e-6)
        metrics = dict(summarise(report), learning_rate=float(self.rate(step)), tokens_per_s=tokens_per_s)
        if self.peak and flops:
            metrics["flops_share"] = self.speed.of(flops, time.monotonic()) / self.peak
        if batch.read_share is not None:
            metrics["read_share"] = batch.read_share
        self._check_skipped(batch, metrics)
        self.last = {"step": step + 1, **metrics}
        if (step + 1) % self.every == 0 or step + 1 == self.steps:
            self.trackers.log(step + 1, metrics)
        shown: dict[str, float | str] = {
            "loss": metrics["loss"],
            "accuracy": " ".join(f"{value:.2f}" for name, value in metrics.items() if name.startswith("accuracy_")),
            "E": metrics["expected_acceptance_length"],
            "tokens/s": f"{tokens_per_s:,.0f}",
        }
        shown |= {"MFU": metrics["flops_share"]} if "flops_share" in metrics else {}
        shown |= {"read": f"{batch.read_share:.0%}"} if batch.read_share is not None else {}
        self.progress.update(step + 1, **shown)

    def _check_skipped(self, batch: StepBatch, metrics: dict[str, float]) -> None:
        """Says that an update was skipped, and stops a run that skips every one, or whose target is broken."""
        if metrics["taken"]:
            self.skipped_in_a_row = 0
            return
        step = batch.step
        if not np.isfinite([metrics["loss"], metrics["gradient_norm"]]).all():
            self.check_target(batch.rows)
        self.skipped_in_a_row += 1
        numbers = f"loss {metrics['loss']:.3g}, gradient norm {metrics['gradient_norm']:.3g}"
        rows = ", ".join(map(str, self.rows_of(step)))
        why = (numbers if metrics["trained"] else "no slot of its rows counts") + (f", rows {rows}" if rows else "")
        self.progress.say(f"step {step + 1}: update skipped ({why}); {metrics['skipped']:.0f} so far")
        if self.skipped_in_a_row == MOST_SKIPPED:
            raise UserError(
                f"{MOST_SKIPPED} updates in a row were skipped, the last at step {step + 1} ({why}): lower "
                "--train.learning-rate or --train.clip, or look at the rows: python -m jeagle.preview "
                f"{self.folder} --start ROW."
            )


def checksums(tree: Any) -> dict[str, int]:
    """The checksum of each array by its path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(jax.tree.map(checksum, tree)))
    return {jax.tree_util.keystr(path): int(value) for path, value in leaves}


def unchanged(before: dict[str, int], after: dict[str, int]) -> list[str]:
    """Paths of the arrays whose checksums are the same."""
    return [path for path, value in before.items() if after[path] == value]


class UnchangedParameters:
    """Notices trained parameters that the first steps of a call have not changed."""

    STEPS = 100

    def __init__(self, draft: Any, trained: Trained, start: int):
        self._last, self._trained, self._before = start + self.STEPS - 1, trained, checksums(draft)

    def after(self, step: int, draft: Any) -> str:
        """After the last of those steps, a warning that names them; otherwise an empty text."""
        if step != self._last:
            return ""
        same = [p for p in unchanged(self._before, checksums(draft)) if self._trained(path_names(p))]
        return f"warning: not changed in {self.STEPS} steps: {', '.join(same)}" if same else ""


class Speed:
    """FLOP/s over the last few reports: compilation, and waiting for the first step, fall out of it."""

    def __init__(self, reports: int = 20):
        self._seen: collections.deque[tuple[float, float]] = collections.deque(maxlen=reports)

    def of(self, flops: float, now: float) -> float:
        """With a report of so many FLOPs at `now`; 0 until there are two."""
        self._seen.append((now, flops))
        since = now - self._seen[0][0]
        return sum(flops for _, flops in list(self._seen)[1:]) / since if since > 0 else 0.0


def summarise(report: StepReport) -> dict[str, float]:
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
