"""Encoders by name, checkpoints, heads, licences."""
