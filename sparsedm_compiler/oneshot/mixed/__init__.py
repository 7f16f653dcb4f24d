"""Mixed patterns: one for every layer, within a budget of MACs or of measured time."""
