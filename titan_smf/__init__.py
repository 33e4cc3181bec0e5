"""Sparse memory finetuning of Llama models with memory layers, across ranks."""

__version__ = "0.1.0"
