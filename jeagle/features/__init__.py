"""Features of prepared data in tensorstore: writing, reading, checking."""

from jeagle.features.claims import Claims
from jeagle.features.formats import (
    LOG_PROBS,
    Form,
    Kind,
    Scaled,
    Stored,
    bytes_per_token,
    channel_scales,
    decode,
    encode,
)
from jeagle.features.manifests import DATA, STORE_FOLDER, Segment, check_fit, check_place, finished, read_store
from jeagle.features.mixture import Dealt, Mixture, open_stores
from jeagle.features.partial import Layout, Partial
from jeagle.features.reader import Store
from jeagle.features.rows import Places, Ragged, joined, places_of, ragged
from jeagle.features.storage import Full, Place
from jeagle.features.verify import Damage, prune, verify
from jeagle.features.writer import Unit, Writer, units_of

__all__ = [
    "DATA",
    "LOG_PROBS",
    "STORE_FOLDER",
    "Claims",
    "Damage",
    "Dealt",
    "Form",
    "Full",
    "Kind",
    "Layout",
    "Mixture",
    "Partial",
    "Place",
    "Places",
    "Ragged",
    "Scaled",
    "Segment",
    "Store",
    "Stored",
    "Unit",
    "Writer",
    "bytes_per_token",
    "channel_scales",
    "check_fit",
    "check_place",
    "decode",
    "encode",
    "finished",
    "joined",
    "open_stores",
    "places_of",
    "prune",
    "ragged",
    "read_store",
    "units_of",
    "verify",
]
