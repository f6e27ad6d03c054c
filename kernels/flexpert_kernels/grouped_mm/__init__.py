"""Matrix products of rows that are sorted by expert, each expert's with its own matrix."""
