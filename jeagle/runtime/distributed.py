"""Runs of several processes: joining them, agreeing, and knowing who speaks."""

import hashlib
import os
import threading
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jeagle.errors import UserError

_VARIABLES = {"coordinator": "JEAGLE_COORDINATOR", "processes": "JEAGLE_PROCESSES", "process_id": "JEAGLE_PROCESS_ID"}
_AUTO = "JEAGLE_DISTRIBUTED"
_MARGIN_SECONDS = 60


def initialise(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout_seconds: int = 300,
) -> None:
    """Joins this process to the others of its run; does nothing for a run of one. Call it before any use of a device.

    What is not given comes from JEAGLE_COORDINATOR (HOST:PORT of process 0), JEAGLE_PROCESSES and JEAGLE_PROCESS_ID.
    On a TPU slice or in a Slurm job JEAGLE_DISTRIBUTED=auto finds all three; it is never tried unasked, because off
    a cluster it hangs. Once joined, a process that dies takes the others with it within two minutes.

    Args:
      timeout_seconds: how long to wait for the others.

    Raises:
      UserError: settings that are incomplete or wrong, or the others did not come in time.
    """
    auto = os.environ.get(_AUTO, "")
    if auto not in ("", "auto"):
        raise UserError(f"{_AUTO} is {auto!r}: set it to auto, or leave it out.")
    group = _group(coordinator, processes, process_id)
    if jax.distributed.is_initialized() or not (group or auto) or group.get("num_processes") == 1:
        return open_devices()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        _join(group, timeout_seconds)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        if not group:
            raise UserError(
                f"{_AUTO}=auto could not join a TPU slice or a Slurm job ({reason}): start the command with a script "
                f"of launch/, or set {', '.join(_VARIABLES.values())}."
            ) from error
        raise UserError(
            f"Process {group['process_id']} could not join the {group['num_processes']} processes of its run at "
            f"{group['coordinator_address']} ({reason}): are all of them started, with the same address, and is its "
            "port open?"
        ) from error
    open_devices()


def open_devices() -> None:
    """Opens the devices, which processes that belong together do once they have joined.

    Raises:
      UserError: where what JAX_PLATFORMS names is missing or busy; it says what the machine has.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # an AssertionError without a text, where the plugin is missing
        wanted = jax.config.jax_platforms
        reason = str(error).partition("\n")[0].partition(" (set JAX_PLATFORMS")[0].rstrip(". ") or "it finds none"
        raise UserError(
            f"JAX_PLATFORMS is {wanted or 'not set'}, and JAX cannot use such devices ({reason}); this machine has "
            f"{_other_devices()}: set JAX_PLATFORMS to what there is, end the process that holds the devices, or "
            "install jeagle with the extra of this accelerator (cuda or tpu)."
        ) from error


def _other_devices() -> str:
    """The devices that JAX finds where it may choose them itself, for a message."""
    wanted = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    try:
        devices = jax.devices()
        return f"{len(devices)} {devices[0].platform} device{'s' * (len(devices) > 1)}"
    except (RuntimeError, AssertionError):
        return "no device that JAX can use"
    finally:
        jax.config.update("jax_platforms", wanted)


def may_lead() -> bool:
    """Whether this process may turn out to be the leader: before `initialise` only its environment tells."""
    if jax.distributed.is_initialized():
        return is_leader()
    return os.environ.get("JEAGLE_PROCESS_ID", "0") == "0"


def surely_leads() -> bool:
    """Whether it is certain already that this process is the leader: it is not where joining will find the number."""
    unknown = os.environ.get(_AUTO) and "JEAGLE_PROCESS_ID" not in os.environ and not jax.distributed.is_initialized()
    return may_lead() and not unknown


def devices_known() -> bool:
    """Whether this process may ask for the run's devices: joined, or alone, not before it joins others."""
    return jax.distributed.is_initialized() or not (
        os.environ.get(_AUTO) or _group(None, None, None).get("num_processes", 1) > 1
    )


def is_leader() -> bool:
    """Whether this process is the one that writes files and speaks. Initialises the devices."""
    return jax.process_index() == 0


def anywhere(value: bool) -> bool:
    """Whether it is true on any process; every one of them must call it."""
    return not everywhere(np.asarray(not value))


def everywhere(values: np.ndarray) -> np.ndarray:
    """Which of these bools are true on all processes; every one of them must call it, with as many."""
    if jax.process_count() == 1:
        return values
    return np.asarray(np.asarray(multihost_utils.process_allgather(values)).all(axis=0))


def same_everywhere(value: str | int, what: str) -> None:
    """Checks that all processes hold the same value; every one of them must call it.

    Hosts that differ in a setting, a row count or a vocabulary would wait for one another for ever, many steps later.

    Args:
      what: names the value in the error, such as "the configuration".

    Raises:
      UserError: on every process, naming those that differ from process 0.
    """
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(f"{type(value).__name__} {value}".encode()).digest()
    digests_PX = np.asarray(multihost_utils.process_allgather(np.frombuffer(digest, np.uint32)))
    others = [str(p) for p, same in enumerate((digests_PX == digests_PX[0]).all(axis=1)) if not same]
    if others:
        here = f" (here it is {str(value)!r})" if len(str(value)) <= 60 else ""
        raise UserError(
            f"The processes of this run differ in {what}: {', '.join(others)} from process 0{here}. "
            "Give every process the same command, data and version."
        )


def _group(coordinator: str | None, processes: int | None, process_id: int | None) -> dict[str, Any]:
    """What jax needs to know of the group, from arguments and the environment; empty where neither says anything."""
    given = {"coordinator": coordinator, "processes": processes, "process_id": process_id}
    values = {
        name: os.environ.get(variable) if given[name] is None else given[name] for name, variable in _VARIABLES.items()
    }
    missing = [_VARIABLES[name] for name, value in values.items() if value in (None, "")]
    if len(missing) == len(values):
        return {}
    if missing:
        raise UserError(f"A run of several processes needs {', '.join(missing)} as well: set all three, or none.")
    host, _, port = str(values["coordinator"]).rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"{_VARIABLES['coordinator']} is {values['coordinator']!r}: it must be HOST:PORT of process 0.")
    try:
        number, of = int(values["process_id"] or 0), int(values["processes"] or 0)
    except ValueError as error:
        raise UserError(f"JEAGLE_PROCESSES and JEAGLE_PROCESS_ID must be whole numbers: {error}.") from error
    if not 0 <= number < of:
        raise UserError(f"Process {number} of {of} cannot be: ids go from 0 to the number less 1.")
    return {
        "coordinator_address": f"{host}:{port}",
        "num_processes": of,
        "process_id": number,
        "cluster_detection_method": "deactivate",
    }


def _join(group: dict[str, Any], timeout_seconds: int) -> None:
    """jax.distributed.initialize in a thread of its own; raises what went wrong.

    Left to itself it ends the process with a C++ stack trace when the others do not come, and ignores Ctrl-C. The
    thread is a daemon, which no pool of threads is: it must not keep the process from leaving.
    """
    joined: Future[None] = Future()

    def join() -> None:
        try:
            jax.distributed.initialize(**group, initialization_timeout=timeout_seconds + _MARGIN_SECONDS)
            joined.set_result(None)
        except Exception as error:
            joined.set_exception(error)

    threading.Thread(target=join, name="joining the other processes", daemon=True).start()
    try:
        joined.result(timeout_seconds)
    except TimeoutError as error:
        raise TimeoutError(str(error) or f"nobody answered for {timeout_seconds} s") from None
