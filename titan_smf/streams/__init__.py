"""Streams of facts and documents: what a model is to learn, one record after another.

In: jsonl streams, question sets, plain text, the invented world, a chat endpoint. Out: records
(`Fact`, `Document`), stream files, and the micro-batches of the continual phase. Imports `data`,
`world`, `config` and what lies below; no model, no trainer, no evaluation.
"""
