"""Comparing methods of learning: one file names the models, the methods and their rates."""
