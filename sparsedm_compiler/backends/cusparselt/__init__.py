"""2:4 products on sparse tensor cores, by cuSPARSELt."""
