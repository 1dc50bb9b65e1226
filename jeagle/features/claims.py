"""Who makes which segment: so that writers side by side share the work. Safety does not rest on it.

Two writers that make the same segment all the same only waste time: the manifest of the first one to finish stands.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid

from jeagle.features.manifests import CLAIMS
from jeagle.features.storage import Place, started

STALE_SECONDS = 600.0  # a writer on another host that has been silent for so long is taken for dead
RENEW_SECONDS = 60.0
_HERE: set[str] = set()  # writers of this process


class Claims:
    """The claims of one writer.

    Attributes:
      writer: a name that no other writer has.
    """

    def __init__(self, place: Place):
        self._place, self.writer = place, uuid.uuid4().hex[:12]
        _HERE.add(self.writer)
        self._held: dict[str, float] = {}

    def take(self, name: str) -> bool:
        """Whether this writer shall make the segment; a claim of a dead writer is taken over."""
        key = f"{CLAIMS}/{name}.json"
        if self._place.write_new(key, self._text()):
            self._held[name] = time.time()
            return True
        if self.alive(name):
            return False
        self._place.delete(key)
        return self.take(name) if self._place.read(key) is None else False

    def alive(self, name: str) -> bool:
        """Whether a living writer, this one included, holds the segment."""
        data = self._place.read(f"{CLAIMS}/{name}.json")
        try:
            claim = json.loads(data or b"null")
            if claim["writer"] in _HERE:
                return True
            if time.time() - claim["renewed"] > STALE_SECONDS:
                return False
            if claim["host"] != socket.gethostname():
                return True
            return claim["process"] != os.getpid() and started(claim["process"]) == claim["started"]
        except (ValueError, KeyError, TypeError):
            return False

    def renew(self) -> None:
        """Says that this writer lives; call it now and then."""
        now = time.time()
        for name, renewed in self._held.items():
            if now - renewed > RENEW_SECONDS:
                self._place.write(f"{CLAIMS}/{name}.json", self._text())
                self._held[name] = now

    def drop(self, name: str) -> None:
        """The segment is finished, or given up."""
        self._held.pop(name, None)
        self._place.delete(f"{CLAIMS}/{name}.json")

    def drop_all(self) -> None:
        for name in list(self._held):
            self.drop(name)

    def _text(self) -> bytes:
        claim = {"writer": self.writer, "host": socket.gethostname(), "process": os.getpid()}
        return json.dumps(claim | {"started": started(os.getpid()), "renewed": time.time()}).encode()
