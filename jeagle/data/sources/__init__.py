"""Where conversations come from: files and datasets, their columns, and conversations in one form."""
