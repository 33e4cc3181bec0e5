"""From text to batches: tokenizers, token shards, packing, and an invented world."""
