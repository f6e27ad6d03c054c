"""The router's probabilities and choices, and the order of rows by expert."""
