"""The study of training methods (benchmarks/methods.py)."""
