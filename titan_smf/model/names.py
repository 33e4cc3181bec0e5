"""Names of parameters: imports nothing, for those that read checkpoints without a model."""


def is_adapter(parameter: str) -> bool:
    """Whether the parameter of this name is not the Llama's, but what LoRA adds to a linear map."""
    return parameter.rpartition(".")[2].startswith("lora_")
