"""Rewrites: each edits a graph and returns the number of changes."""
