"""The invented world: facts under made-up names, and text, streams and questions about them.

In comes a path such as `synthetic:world?seed=0&facts=2000` (source.py), out comes a `World`
(world.py), whose documents, facts and chunks are the same on every machine. The rooms data/,
streams/ and evaluation/ read it; it may import none of them, and has records of its own.
"""
