"""What the NVIDIA kernel families share: device facts, NVRTC, im2col, token padding, the timer."""
