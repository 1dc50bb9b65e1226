"""From a config or a run's folder to live things: mesh, target, draft, rows, tables, acceptance."""
