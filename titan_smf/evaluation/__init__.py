"""What a model knows: answers to questions, choices, likelihoods, with confidence intervals."""
