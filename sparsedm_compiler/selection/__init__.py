"""Masks of the largest weights of every group, or of every 4x4 tile, without sorting them."""
