"""Products over gathered columns for masks that many rows share, in Triton."""
