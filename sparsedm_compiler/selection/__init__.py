"""Selection of the largest of every group of numbers, without a sort."""
