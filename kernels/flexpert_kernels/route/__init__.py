"""The router's probabilities and choices, and the order of rows by expert."""

#: That the kernels take.
MAX_EXPERTS = 256
