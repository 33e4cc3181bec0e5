"""What a model knows: answers to questions, choices and likelihoods, with confidence intervals.

    sets.py -> tasks.py -> evaluated_model.py (batches on all ranks) -> metrics.py -> results.py

In come `[evaluation]`, a model that is split over the ranks and its tokenizer; out go
`results.jsonl`, readable predictions and the means for a run's metrics. Knows no trainer: imports
nothing of `training` nor of what uses it.
"""
