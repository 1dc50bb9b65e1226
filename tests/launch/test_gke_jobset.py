"""launch/gke_jobset.yaml: numbers that must agree, and a command that exists."""

from __future__ import annotations

import importlib
import math
import re

import pytest
import yaml

from jeagle import flags as configs
from tests.launch.test_launch import LAUNCH, ROOT


@pytest.fixture(scope="module")
def job():
    tree = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert (tree["apiVersion"], tree["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    [slice_] = tree["spec"]["replicatedJobs"]
    assert slice_["replicas"] == 1
    return slice_["template"]["spec"]


@pytest.fixture(scope="module")
def pod(job):
    return job["template"]["spec"]


@pytest.fixture
def config(pod, monkeypatch):
    """What the command makes of its arguments, from where it is started."""
    monkeypatch.chdir(ROOT)
    python, option, module, *arguments = pod["containers"][0]["command"]
    assert (python, option) == ("python", "-m") and callable(importlib.import_module(module).main)
    return configs.from_command_line(arguments, program=module, description="")


def test_hosts_have_all_chips_of_the_slice_and_all_of_them_must_run(job, pod, config):
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = math.prod(map(int, topology.split("x")))
    assert job["parallelism"] * pod["containers"][0]["resources"]["limits"]["google.com/tpu"] == chips
    assert job["parallelism"] == job["completions"]
    assert (
        job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    )  # one that is lost restarts all: they are one run
    assert config.train.batch_rows % chips == 0


def test_what_must_outlive_a_host_lies_on_the_shared_volume(pod, config):
    [mount] = pod["containers"][0]["volumeMounts"]
    [volume] = pod["volumes"]
    assert mount["name"] == volume["name"] and "persistentVolumeClaim" in volume
    for place in (config.runs, config.target.ref, config.data.source):
        assert place.startswith(mount["mountPath"] + "/")


def test_the_hosts_look_for_one_another(pod):
    assert {"name": "JEAGLE_DISTRIBUTED", "value": "auto"} in pod["containers"][0]["env"]


def test_the_image_that_it_describes_installs_an_extra_that_exists():
    [extra] = re.findall(r"-e '\.\[(\w+)\]'", (LAUNCH / "gke_jobset.yaml").read_text())
    assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text()
