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
