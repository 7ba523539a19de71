"""The search for the tables of minimax."""
