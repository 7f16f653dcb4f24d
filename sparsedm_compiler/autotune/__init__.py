"""Kernel selection: every candidate is timed beside dense, and the fastest one runs."""
