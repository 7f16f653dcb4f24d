"""N:M masks of weights: selection, masked products with a straight-through gradient, detection."""
