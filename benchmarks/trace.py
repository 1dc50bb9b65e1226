"""The operations that take a device's time, from the trace.json.gz that `jax.profiler` writes.

A device's time is what its tracks show: a GPU's streams, a TPU's XLA operations; of CPUs, what the client's threads say
of XLA operations. An operation that encloses others on its track, as a loop does, counts only what they leave.
"""

from __future__ import annotations

import collections
import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from jeagle.errors import UserError

TOP = 15
_FILES = "*.trace.json.gz"
MOST_EVENTS = 1_000_000  # jax leaves out what is more
_FROM = ("tf_op", "name", "long_name")  # where a trace says what an operation was made from, by platform


class Event(NamedTuple):
    """An operation that ran, in microseconds; `device` tells devices apart, `track` what runs on one side by side."""

    device: Any
    track: Any
    op: str
    made_from: str
    begun: float
    ended: float


def folders(below: Path) -> list[Path]:
    """Where profiles lie, the oldest first.

    Raises:
      UserError: where there is none.
    """
    found = sorted({path.parent for path in below.rglob(_FILES)}, key=lambda folder: (folder.stat().st_mtime, folder))
    if not found:
        raise UserError(f"No {_FILES} lies below {below}: name the folder that --profile wrote to.")
    return found


def hosts(folder: Path) -> list[list[dict[str, Any]]]:
    """The traceEvents of each host that wrote a profile."""
    return [json.loads(gzip.decompress(path.read_bytes()))["traceEvents"] for path in sorted(folder.glob(_FILES))]


def summary(hosts: list[list[dict[str, Any]]], names: dict[str, str] | None = None) -> dict[str, Any]:
    """The operations that take most time.

    Args:
      hosts: each host's traceEvents. names: what operations were made from, where the trace does not say.

    Returns:
      devices; seconds_a_device, from the first operation to the last one's end; busy_share of them in which some
      operation ran; truncated, whether jax left events out; top, of each operation its seconds a device, their share of
      all operations' seconds, calls on all devices, and what it was made from.
    """
    events = [event for number, raw in enumerate(hosts) for event in device_events(raw, number)]
    by_device: dict[Any, list[tuple[float, float]]] = collections.defaultdict(list)
    seconds, calls, origins = collections.Counter[str](), collections.Counter[str](), dict(names or {})
    for event, own in own_times(events):
        by_device[event.device].append((event.begun, event.ended))
        seconds[event.op] += own * 1e-6
        calls[event.op] += 1
        origins[event.op] = origins.get(event.op) or event.made_from
    whole, devices = sum(seconds.values()), max(len(by_device), 1)
    span = sum(max(e for _, e in spans) - min(b for b, _ in spans) for spans in by_device.values()) * 1e-6
    busy = sum(covered(spans) for spans in by_device.values()) * 1e-6
    return {
        "devices": len(by_device),
        "seconds_a_device": span / devices,
        "busy_share": round(busy / span, 4) if span else None,
        "truncated": any(len(raw) >= MOST_EVENTS for raw in hosts),
        "top": [
            {
                "op": op,
                "seconds": time / devices,
                "share": round(time / whole, 4),
                "calls": calls[op],
                "made_from": origins[op],
            }
            for op, time in sorted(seconds.items(), key=lambda item: (-item[1], item[0]))[:TOP]
            if whole
        ],
    }


def device_events(raw: list[dict[str, Any]], host: int = 0) -> list[Event]:
    """What ran on a host's devices: of its tracks the first kind of `_TRACKS` that there is, each telling it all."""
    labels = [event for event in raw if event.get("ph") == "M"]
    processes = {e["pid"]: e["args"]["name"] for e in labels if e["name"] == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in labels if e["name"] == "thread_name"}
    found: dict[str, list[Event]] = collections.defaultdict(list)
    for event in raw:
        if event.get("ph") != "X":
            continue
        pid, tid, args = event["pid"], event["tid"], event.get("args") or {}
        if processes.get(pid, "").startswith("/device:"):
            track, device = threads.get((pid, tid), "").split(" #")[0], (host, pid)
        elif "hlo_op" in args:
            track, device = _HOST, (host, args.get("device_ordinal"))
        else:
            continue
        op, origin = args.get("hlo_op") or event["name"], next((str(args[n]) for n in _FROM if args.get(n)), "")
        ended = event["ts"] + event.get("dur", 0.0)
        found[track].append(Event(device, (host, pid, tid), op, origin, event["ts"], ended))
    return next((found[track] for track in _TRACKS if track in found), [])


_HOST = "host"
_TRACKS = ("Stream", "XLA Ops", _HOST)  # of GPUs ("Stream #14(Compute)"), of TPUs, of CPUs


def own_times(events: Iterable[Event]) -> list[tuple[Event, float]]:
    """Each event with the microseconds in which no other one ran within it on its track."""
    tracks: dict[Any, list[Event]] = collections.defaultdict(list)
    for event in events:
        tracks[event.track].append(event)
    found = []
    for track in tracks.values():
        track.sort(key=lambda event: (event.begun, -event.ended))
        own, open_ = [event.ended - event.begun for event in track], list[int]()
        for number, event in enumerate(track):
            while open_ and track[open_[-1]].ended <= event.begun:
                open_.pop()
            if open_:
                own[open_[-1]] -= min(event.ended, track[open_[-1]].ended) - event.begun
            open_.append(number)
        found += zip(track, own, strict=True)
    return found


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """How much of the line the spans cover together."""
    total, reached = 0.0, float("-inf")
    for begun, ended in sorted(spans):
        total += max(ended - max(begun, reached), 0.0)
        reached = max(reached, ended)
    return total


def table(found: dict[str, Any]) -> str:
    """A summary to read."""
    if not found["top"]:
        return "no operation of a device in this trace"
    busy = (
        f"{found['devices']} device(s), {found['seconds_a_device']:.4g} s, busy {100 * found['busy_share']:.1f} % of it"
    )
    if found["truncated"]:
        busy += "; jax left events out: trace fewer steps"
    lines = [busy, f"{'seconds':>9}  {'share':>6}  {'calls':>6}  operation"]
    for op in found["top"]:
        origin = f"  {op['made_from'][-80:]}" if op["made_from"] else ""
        lines.append(f"{op['seconds']:9.4f}  {100 * op['share']:5.1f}%  {op['calls']:6}  {op['op']}{origin}")
    return "\n".join(lines)
