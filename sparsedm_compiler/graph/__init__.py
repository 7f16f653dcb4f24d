"""Captured FX graphs: capture, one flat list of ops, the op table, names and stack traces."""
