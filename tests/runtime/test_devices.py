"""Devices that are missing or busy are named in one sentence, with what the machine has, before the work."""

import jax
import pytest

from jeagle import bench, export, extract, import_draft, regenerate, train
from jeagle.errors import UserError
from jeagle.runtime import distributed
from tests import tiny

FAULTS = {
    "missing": RuntimeError(
        "Unable to initialize backend 'tpu': INTERNAL: Failed to open libtpu.so (set JAX_PLATFORMS='' to choose)"
    ),
    "busy": RuntimeError("Unable to initialize backend 'tpu': ABORTED: The TPU is already in use by process 17"),
    "without a text": AssertionError(),
}


@pytest.fixture
def wanted(request, monkeypatch) -> None:
    """JAX_PLATFORMS=tpu on a machine with one CPU, as jax 0.8 fails there."""
    fault = FAULTS[request.param]
    chosen = {"jax_platforms": "tpu"}

    def devices() -> list:
        if chosen["jax_platforms"]:
            raise fault
        return [type("Device", (), {"platform": "cpu"})]

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setattr(type(jax.config), "jax_platforms", property(lambda _: chosen["jax_platforms"]), raising=False)
    update = jax.config.update
    monkeypatch.setattr(
        jax.config,
        "update",
        lambda name, value: chosen.update({name: value}) if name in chosen else update(name, value),
    )


@pytest.mark.parametrize("wanted", FAULTS, indirect=True)
def test_the_sentence_says_what_is_wanted_and_what_is_there(wanted):
    with pytest.raises(UserError, match=r"JAX_PLATFORMS is tpu.*this machine has 1 cpu device") as error:
        distributed.open_devices()
    assert "\n" not in str(error.value) and "set JAX_PLATFORMS=''" not in str(error.value)
    assert jax.config.jax_platforms == "tpu"  # as it was


COMMANDS = {
    "train": (train, []),
    "extract": (extract, ["--out", "store"]),
    "bench": (bench, ["--run", "x"]),
    "regenerate": (regenerate, ["--target", "x", "--out", "x"]),
    "import_draft": (import_draft, ["x", "--out", "y"]),
    "export": (export, ["sglang", "--run", "x"]),
}


@pytest.mark.parametrize("wanted", ["missing"], indirect=True)
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_that_computes_says_it_first(wanted, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command, arguments = COMMANDS[name]
    flags = tiny.flags(tmp_path) if name in ("train", "extract") else []
    with pytest.raises(UserError, match="JAX_PLATFORMS is tpu"):
        command.main([*arguments, *flags])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("wanted", ["missing"], indirect=True)
def test_a_process_that_is_to_join_others_does_not_open_them_before(wanted, monkeypatch):
    monkeypatch.setenv("JEAGLE_DISTRIBUTED", "auto")
    assert not distributed.devices_known()
