"""V:n:m products on sparse tensor cores, in CUDA C++ that NVRTC builds on first use."""
