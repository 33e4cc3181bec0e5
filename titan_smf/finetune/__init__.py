"""What a finetuning step does: the methods beside training everything."""
