"""Trainers run segments: members of one signature, from their state, until an epoch."""
