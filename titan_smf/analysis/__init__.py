"""Which memory slots hold a fact, and how well each ranking finds them; nothing is trained.

    analysis_config.py -> access_analysis.py (the pass over a stream) -> measures.py
                       -> access_report.py (files, tables), access_pictures.py, coloured_texts.py

In come a trainer with a run's weights, its stream and the counts of its background; out go
`access_analysis.json`, pictures and coloured texts. Imports nothing of `report`, `reproduce` or
`commands`; what only reads the file imports no torch.
"""
