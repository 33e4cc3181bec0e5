"""The model: Llama blocks, memory layers, the value table split by rows, LoRA, parallelisation.

In: sizes (`args.py`) and token ids. Out: logits, and the rows of the tables that were accessed. May
use `ops`, `config` and `torchtitan_api`; knows nothing of data, selection, checkpoints or training.
"""
