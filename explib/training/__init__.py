"""Training under masks, evaluation, BatchNorm statistics, and how a network runs here."""
