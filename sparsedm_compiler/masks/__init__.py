"""N:M masks of weights: masks, masked weights with a straight-through gradient, detection."""
