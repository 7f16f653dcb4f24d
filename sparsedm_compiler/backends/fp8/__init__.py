"""Masked weights multiplied dense in 8 bits, by cuBLASLt and CUTLASS through torch."""
