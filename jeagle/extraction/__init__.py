"""Hidden states of rows into a store: plan, capture, fill, agreement with the target."""
