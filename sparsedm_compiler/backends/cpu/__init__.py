"""CPU kernels for per-row and shared masks, in C++ that is built on first use."""
