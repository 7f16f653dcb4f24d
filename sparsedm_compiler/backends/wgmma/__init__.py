"""Hopper's own tensor-core instructions: blocks of weights, and 2:4."""
