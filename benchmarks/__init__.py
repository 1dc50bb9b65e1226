"""Measurements beside the peers; each script prints JSON. RESULTS.md holds what they showed."""
