"""Wire types, preference records, image references, order swap, difficulty selection."""
