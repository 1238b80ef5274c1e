"""Checkpoints on disk: shards, their layout in config.json, the model card."""
