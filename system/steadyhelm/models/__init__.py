"""Model folders, prompts as token ids, batches, log-probs and decoding: one place for all services."""
