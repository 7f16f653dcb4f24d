"""Sparse kernels: one folder for each kernel family, behind ``kernel_family.KernelFamily``."""
