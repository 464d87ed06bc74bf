"""Rollout: prompts in, trajectory shards out."""
