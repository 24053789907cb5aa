"""Observers show a run while it goes on. What they write is derived from the record and can be deleted."""
