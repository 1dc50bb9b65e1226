"""The launch scripts: what they would start, what they refuse, and two real processes that find each other."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
COMMAND = ["python", "-m", "jeagle.train", "--name", "a name; with $signs"]
# A shell hands an ignored SIGINT on to its children and cannot trap it, and CI may start with one: heard again, exec.
HEAR = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
CLEARED = ("JEAGLE_", "SLURM_", "CUDA_VISIBLE", "JAX_LOCAL", "XLA_FLAGS")


def environment(**added):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(CLEARED)}
    return kept | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | added


def launch(script, *arguments, **variables):
    command = [str(LAUNCH / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment(**variables))


def printed(script, *arguments, **variables):
    done = launch(script, *arguments, "--print-only", "--", *COMMAND, **variables)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def test_a_slice_runs_the_same_command_on_every_host():
    options = ["--name", "slice", "--zone", "us-east5-b", "--project", "p", "--folder", "my folder"]
    [[*gcloud, remote]] = printed("tpu_pod.sh", *options)
    assert gcloud == shlex.split("gcloud compute tpus tpu-vm ssh slice --zone=us-east5-b --worker=all --project=p")
    assert remote.startswith("--command=")
    in_the_remote_shell = shlex.split(remote.removeprefix("--command="))
    assert in_the_remote_shell == ["cd", "my folder", "&&", "env", "JEAGLE_DISTRIBUTED=auto", *COMMAND]


@pytest.mark.parametrize("folder", ["~", "~/my folder", "~user/it's", "/a b", "it's"])
def test_the_folder_of_a_slice_may_be_in_the_home_of_its_hosts(folder):
    [[*_, remote]] = printed("tpu_pod.sh", "--name", "slice", "--zone", "z", "--folder", folder)
    written = remote.removeprefix("--command=").partition(" && ")[0].removeprefix("cd ")
    assert written.startswith("~") == folder.startswith("~")
    assert shlex.split(written) == [folder]


def test_a_slurm_job_runs_the_same_command_in_every_task():
    assert printed("slurm.sh") == [["srun", "--kill-on-bad-exit=1", "env", "JEAGLE_DISTRIBUTED=auto", *COMMAND]]


def test_one_process_of_a_machine_needs_no_settings():
    assert printed("gpu_node.sh") == [COMMAND]


def test_processes_of_a_machine_are_numbered_and_meet_at_one_address():
    lines = printed("gpu_node.sh", "--processes", "3", "--port", "4321")
    assert lines == [
        ["env", "JEAGLE_COORDINATOR=127.0.0.1:4321", "JEAGLE_PROCESSES=3", f"JEAGLE_PROCESS_ID={i}", *COMMAND, "&"]
        for i in range(3)
    ]


@pytest.mark.parametrize(("processes", "shares"), [(2, ["0,1,2", "3,4,5"]), (3, ["0,1", "2,3", "4,5"])])
def test_processes_of_a_machine_share_its_gpus_without_overlap(processes, shares):
    variables = {"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": "2,3,4,5,6,7"}
    lines = printed("gpu_node.sh", "--processes", str(processes), **variables)
    assert [line[4] for line in lines] == [f"JAX_LOCAL_DEVICE_IDS={share}" for share in shares]


@pytest.mark.parametrize(
    ("script", "arguments", "sentence"),
    [
        ("tpu_pod.sh", ["--zone", "z", "--", "true"], "--name"),
        ("tpu_pod.sh", ["--name", "n", "--", "true"], "--zone"),
        ("tpu_pod.sh", ["--name"], "--name needs a value"),
        ("tpu_pod.sh", ["--name", "n", "--zone", "z"], "no command"),
        ("slurm.sh", ["--"], "no command"),
        ("slurm.sh", ["--", "true"], "sbatch"),
        ("slurm.sh", ["true"], "no option true"),
        ("gpu_node.sh", ["--processes", "0", "--", "true"], "--processes is '0'"),
        ("gpu_node.sh", ["--processes"], "--processes needs a number"),
        ("gpu_node.sh", ["--port", "http", "--", "true"], "--port is 'http'"),
        ("gpu_node.sh", ["--proceses", "2", "--", "true"], "no option --proceses"),
        ("gpu_node.sh", [], "no command"),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(script, arguments, sentence):
    done = launch(script, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and sentence in done.stderr and done.stderr.count("\n") == 1


def test_gpus_that_cannot_be_shared_evenly_are_refused():
    variables = {"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": "0,1,2"}
    done = launch("gpu_node.sh", "--processes", "2", "--", "true", **variables)
    assert done.returncode == 2 and "3 GPUs" in done.stderr


@pytest.mark.parametrize("script", ["tpu_pod.sh", "slurm.sh", "gpu_node.sh"])
def test_help_shows_every_option(script):
    done = launch(script, "--help")
    options = [line.split(")")[0].strip() for line in (LAUNCH / script).read_text().splitlines() if ") " in line]
    options = [option for option in options if option.startswith("--") and option != "--"]
    assert done.returncode == 0 and options
    assert all(option.split(" | ")[0] in done.stdout for option in options)


def start(program, *, processes=2):
    """`gpu_node.sh` with processes of this Python program, in a process group of its own."""
    command = [LAUNCH / "gpu_node.sh", "--processes", str(processes), "--port", free_port(), "--"]
    command += [sys.executable, "-c", textwrap.dedent(program)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", HEAR, *command], env=environment(), start_new_session=True, **pipes)


def test_two_processes_add_across_one_another():
    """Each process holds its share of an array; the sum over the mesh is that of all of it."""
    running = start(
        """
        import jax, numpy as np
        from jax.sharding import PartitionSpec as P
        from jeagle.runtime import distributed
        from jeagle.runtime.cli import run

        def main(arguments):
            distributed.initialise()
            distributed.same_everywhere("the same", "a word")
            mesh = jax.make_mesh((jax.device_count(),), ("data",))
            mine = np.full((jax.local_device_count(), 3), 10.0 ** jax.process_index())
            whole = jax.make_array_from_process_local_data(jax.NamedSharding(mesh, P("data")), mine)
            add = jax.shard_map(lambda x: jax.lax.psum(x, "data"), mesh=mesh, in_specs=P("data"), out_specs=P())
            total = add(whole)
            if distributed.is_leader():
                print(jax.process_count(), total.tolist())

        run(main)
        """
    )
    stdout, stderr = running.communicate()
    assert running.returncode == 0, stderr
    assert "2 [[11.0, 11.0, 11.0]]" in stdout.splitlines()


def test_processes_that_differ_say_in_what_and_all_stop():
    running = start(
        """
        import jax
        from jeagle.runtime import distributed
        from jeagle.runtime.cli import run

        def main(arguments):
            distributed.initialise()
            distributed.same_everywhere(7 + jax.process_index(), "the number of rows")
            print("went on")

        run(main)
        """
    )
    stdout, stderr = running.communicate()
    assert running.returncode == 2 and "went on" not in stdout
    assert "error: The processes of this run differ in the number of rows: 1 from process 0" in stderr


def test_when_one_fails_the_others_are_stopped_and_its_status_is_told():
    running = start(
        """
        import os, sys, time
        sys.exit(7) if os.environ["JEAGLE_PROCESS_ID"] == "1" else time.sleep(3600)
        """
    )
    running.communicate()
    assert running.returncode == 7


def test_a_command_that_does_not_exist_fails():
    command = [LAUNCH / "gpu_node.sh", "--processes", "2", "--port", free_port(), "--", "no-such-command"]
    assert subprocess.run(command, env=environment(), capture_output=True).returncode == 127


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_every_process_and_how_they_take_them_decides(number):
    """Both processes are up, the script alone gets the signal, both handle it and end well: so does the script."""
    running = start(
        """
        import os, signal, sys
        def leave(number, frame):
            os.write(1, f"{signal.Signals(number).name}\\n".encode())
            sys.exit(0)
        signal.signal(signal.SIGINT, leave), signal.signal(signal.SIGTERM, leave)
        os.write(1, b"up\\n")
        while True:
            signal.pause()
        """
    )
    assert [running.stdout.readline() for _ in range(2)] == ["up\n", "up\n"]
    running.send_signal(number)
    stdout, stderr = running.communicate()
    assert stdout == f"{number.name}\n" * 2
    assert running.returncode == 0, stderr
