"""Stores of features: writing, reading and checking them with tensorstore."""

from jeagle.features.formats import (
    LOG_PROBS,
    ScaledVectors,
    StoredFeatures,
    StoreFormat,
    bytes_per_token,
    channel_scales,
    decode_features,
    encode_features,
    joined_rows,
    ragged_rows,
)
from jeagle.features.manifests import (
    DATA,
    SPLITS,
    STORE_FOLDER,
    TABLES,
    Segment,
    check_fit,
    check_storage,
    is_finished,
    read_store,
)
from jeagle.features.reader import Store, StoreSet, verify_store
from jeagle.features.storage import Storage
from jeagle.features.writer import WorkUnit, Writer, prune_store, work_units

__all__ = [
    "DATA",
    "LOG_PROBS",
    "SPLITS",
    "STORE_FOLDER",
    "TABLES",
    "ScaledVectors",
    "Segment",
    "Storage",
    "Store",
    "StoreFormat",
    "StoreSet",
    "StoredFeatures",
    "WorkUnit",
    "Writer",
    "bytes_per_token",
    "channel_scales",
    "check_fit",
    "check_storage",
    "decode_features",
    "encode_features",
    "is_finished",
    "joined_rows",
    "prune_store",
    "ragged_rows",
    "read_store",
    "verify_store",
    "work_units",
]
