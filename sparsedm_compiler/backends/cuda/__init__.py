"""Parts that the NVIDIA kernel families share: device facts, NVRTC, im2col, padding, a timer."""
