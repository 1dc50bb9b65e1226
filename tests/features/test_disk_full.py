"""A disk that runs full: one sentence with numbers, nothing half written, and the same call goes on."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jeagle import features
from jeagle.errors import UserError
from tests.features import made

ROOT = Path(__file__).parents[2]
SCRIPT = """
set -e
mount -t tmpfs -o size=1000k none {folder}
exec {python} -c '
from pathlib import Path
from typing import Any
from jeagle import features
from jeagle.errors import UserError
from tests.features import made
folder = Path("{folder}")
(folder / "ballast").write_bytes(bytes(800_000))
try:
    made.fill(folder / "s", "float32")
    raise SystemExit("the disk was not full")
except UserError as error:
    print(error)
store = features.Store(str(folder / "s"))
assert store.missing() and not list(features.verify_store(store))
assert {{s.data for s in store.segments}} == set(store.storage.names("segments"))
(folder / "ballast").unlink()
made.fill(folder / "s", "float32")
made.check_whole(folder / "s", "float32")
'
"""


def can_mount() -> bool:
    command = ["unshare", "-rm", "bash", "-c", "mount -t tmpfs none /tmp"]
    return bool(shutil.which("unshare")) and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="a tmpfs of its own cannot be mounted here")
def test_a_full_disk_stops_cleanly_and_is_gone_on_from(tmp_path):
    script = SCRIPT.format(folder=tmp_path, python=sys.executable)
    done = subprocess.run(["unshare", "-rm", "bash", "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        "is full: segment" in done.stdout and "MB are free" in done.stdout and "it continues from them" in done.stdout
    )


def test_a_disk_that_fills_up_before_the_manifest(tmp_path):
    writer = features.Writer(features.Storage(tmp_path / "s"), made.about("int8"))
    unit = features.work_units(made.SPLITS, 3)[0]
    rows = features.ragged_rows(*made.content("train", "int8"), unit.rows)
    writer.storage._opened = FullForManifests(writer.storage._kv)
    with pytest.raises(UserError, match=r"segment train-000000 needs .* MB are free"):
        writer.commit(unit, rows, 8)
    assert writer.storage.names("segments") == []


class FullForManifests:
    """A key-value store on a disk that is full once a manifest is written, with tensorstore's own message."""

    def __init__(self, true: Any):
        self.true = true

    def __getattr__(self, name: str) -> Any:
        return getattr(self.true, name)

    def write(self, key: str, data: bytes | None, **how: Any) -> Any:
        if key.startswith("manifests/"):
            raise ValueError(f"UNKNOWN: Failed to write: {key!r}: No space left on device [os_error_code='28']")
        return self.true.write(key, data, **how)
