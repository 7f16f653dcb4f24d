"""Captured FX graphs: capture, the flat list of ops, the op table, names and stack traces."""
