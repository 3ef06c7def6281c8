"""Shards -> batches: sources, index, order, storage, decode, features, batch, loader."""
