"""From text to batches of tokens.

    rows, raw_text -> prepare (with a tokenizer) -> token_shards -> packing -> loader, replay

In come text files, hub datasets and the invented world (`sources` opens any of them by its path);
out come token shards on disk and batches of token ids. Knows no facts, model or trainer: nothing of
streams/, sparse/ or what stands above them may be imported.
"""
