"""Names of parameters; imports nothing, for modules that read checkpoints without a model."""


def is_adapter(parameter: str) -> bool:
    """Whether a parameter of this name belongs to a LoRA adapter, not to the Llama itself."""
    return parameter.rpartition(".")[2].startswith("lora_")
