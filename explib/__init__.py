"""EXP pruning."""
