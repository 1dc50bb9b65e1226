"""Exports a run's draft for servers, and imports a published draft as a run."""
