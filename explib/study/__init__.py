"""The study: what a run is, its record, and what it is compared with."""
