"""A^(-1/p) by one minimax polynomial: the ladder that evaluates it, its tables, and the solver."""
