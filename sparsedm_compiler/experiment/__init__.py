"""Whole experiments from one configuration: open, compile, train, sample and score."""
