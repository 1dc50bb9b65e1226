"""Data sets of the hub, with a local copy in its place."""

from __future__ import annotations

import pytest

from jeagle.data import SOURCES, Reading, parse_source, read_source
from jeagle.errors import UserError
from tests.data.sources import ROWS
from tests.data.test_sources import write


@pytest.mark.parametrize("name", SOURCES)
def test_each_named_source_is_read_from_the_hub(tmp_path, monkeypatch, name):
    """The real library, on a local copy in place of the hub, streamed and not."""
    import datasets

    real, asked = datasets.load_dataset, []

    def load(hub, config, *, split, streaming):
        asked.append((hub, config, split))
        return real("parquet", data_files=str(path), split="train", streaming=streaming, cache_dir=str(tmp_path / "c"))

    path = write(tmp_path / "rows.parquet", [ROWS[name]] * 2)
    monkeypatch.setattr(datasets, "load_dataset", load)
    found = []
    for streaming in (False, True):
        reading = Reading()
        found.append(list(read_source(parse_source(name), reading, streaming=streaming)))
        known = SOURCES[name]
        assert asked[: len(known.splits)] == [(known.hub, known.config, split) for split in known.splits]
        assert reading.lines == 2 * len(known.splits) and len(found[-1]) == 1
    assert found[0] == found[1]


def test_a_data_set_that_cannot_be_had_is_one_sentence(monkeypatch):
    import datasets

    def fail(*_, **__):
        raise ConnectionError("no route\nto the host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    part = parse_source("owner/name:config#test")[0]
    assert (part.hub, part.config, part.splits) == ("owner/name", "config", ("test",))
    with pytest.raises(UserError, match="owner/name cannot be had .no route."):
        list(part.rows(streaming=False))
