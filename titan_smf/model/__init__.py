"""The model: Llama blocks, the memory layer, and the value table split by rows."""
