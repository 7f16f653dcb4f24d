"""Channel permutation: neighbours are exchanged, exactly, so that a pattern keeps more energy."""
