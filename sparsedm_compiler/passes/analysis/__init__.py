"""Analyses: each reads a graph and returns frozen values."""
