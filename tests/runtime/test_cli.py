"""Laws of cli.run: what the user sees, and the status that the shell sees."""

import subprocess
import sys
import textwrap

import pytest


def ends(body, *arguments, **options):
    """Runs a command whose main has this body; returns (status, stdout, stderr)."""
    program = "from jeagle.runtime.cli import run\nfrom jeagle.errors import UserError\ndef main(arguments):\n"
    program += textwrap.indent(textwrap.dedent(body), "    ") + "\nrun(main)\n"
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, **options)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("body", "status"),
    [("return None", 0), ("return 3", 3), ("raise SystemExit", 0), ("raise SystemExit(4)", 4)],
)
def test_the_status_is_what_main_says(body, status):
    assert ends(body) == (status, "", "")


def test_main_gets_the_arguments_without_the_program():
    assert ends("print(arguments)", "--a", "b") == (0, "['--a', 'b']\n", "")


def test_a_user_error_is_one_line_and_status_2():
    assert ends("raise UserError('No recipe at x.py.')") == (2, "", "error: No recipe at x.py.\n")


def test_an_exit_with_a_sentence_prints_it():
    assert ends("raise SystemExit('a sentence')") == (1, "", "a sentence\n")


def test_an_interrupt_is_one_line_and_130():
    status, _, stderr = ends("raise KeyboardInterrupt")
    assert status == 130 and stderr.strip().startswith("interrupted") and "Traceback" not in stderr


def test_a_bug_keeps_its_traceback():
    status, _, stderr = ends("return 1 / 0")
    assert status == 1 and "Traceback" in stderr and "ZeroDivisionError" in stderr


def test_a_reader_that_goes_away_is_quiet():
    status, _, stderr = ends(
        """
        import os, sys
        read, write = os.pipe()
        os.dup2(write, 1)
        os.close(write), os.close(read)
        print("lost")
        """
    )
    assert status == 141 and stderr == ""


def test_a_failing_process_of_many_does_not_wait_for_the_others():
    """What jax would do at exit, wait for the other processes, must not happen after a failure."""
    status, stdout, stderr = ends(
        """
        import atexit, jax
        atexit.register(print, "waited for the others")
        jax.distributed.is_initialized = lambda: True
        print("said before")
        raise UserError("no")
        """
    )
    assert (status, stdout, stderr) == (2, "said before\n", "error: no\n")
