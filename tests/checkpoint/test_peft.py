"""The adapters of a run load in PEFT and do there what they do here."""

from pathlib import Path

import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.launch import run_on_ranks
from tests.support.training_runs import DENSE, FULL_FT, LORA_FT, build, train, weights
from tests.training.test_baselines import SHORT, TOKENS, logits

HEADS, KV_HEADS = 4, 2
MODEL = DENSE | {"model.n_kv_heads": KV_HEADS}
HF_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def learn_and_look(rank: int, ranks: int, folder: str, targets: list[str]) -> list[torch.Tensor]:
    """The logits of a base, and of it with the adapters that runs with these targets have left."""
    base = Path(folder) / "base"
    train(rank, ranks, folder, {"base": SHORT | FULL_FT | MODEL | {"optimizer.lr": 0.01}})
    found = []
    for name in targets:
        settings = SHORT | LORA_FT | MODEL | {"lora.targets": name, "optimizer.lr": 0.01}
        settings["checkpoint.initial_load_path"] = str(base)
        trainer = build(Path(folder) / name, settings)
        trainer.restore()
        before = logits(trainer)
        trainer.train()
        found += [before, logits(trainer)]
        trainer.close()
    return found


def hugging_face(weights: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    """A plain Llama with these weights, converted as Llama's are."""
    config = LlamaConfig(
        vocab_size=weights["model.tok_embeddings.weight"].shape[0],
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=4,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        rms_norm_eps=1e-5,
        rope_parameters={  # torchtitan's Llama has the frequencies of Llama 3.1
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).double()
    converted = {}
    for name, weight in weights.items():
        parts = name.removeprefix("model.").removesuffix(".weight").split(".")
        layer = parts[:2] if parts[0] == "layers" else []
        ours = ".".join(parts[len(layer) :])
        if ours in ("attention.wq", "attention.wk"):
            heads = HEADS if ours == "attention.wq" else KV_HEADS
            pairs = weight.view(heads, weight.shape[0] // heads // 2, 2, weight.shape[1])
            weight = pairs.transpose(1, 2).reshape(weight.shape)
        prefix = ["model", *layer] if layer else []
        converted[".".join([*prefix, HF_NAMES[ours], "weight"])] = weight
    model.load_state_dict(converted)
    return model.eval()


def test_peft_loads_the_adapters_of_a_run(tmp_path: Path) -> None:
    targets = ["all", "attention", "wk,w2"]
    (found,) = run_on_ranks(learn_and_look, 1, str(tmp_path), targets)
    base = weights(tmp_path / "base", 4)
    for index, name in enumerate(targets):
        before, after = found[2 * index : 2 * index + 2]
        with torch.no_grad():
            model = hugging_face(base)
            assert (model(TOKENS).logits - before).abs().max() < 1e-5  # float32 in norm and rotary
            with_adapters = PeftModel.from_pretrained(model, str(tmp_path / name)).eval()
            there = with_adapters(TOKENS).logits
            assert (there - after).abs().max() < 1e-5, name
            assert (after - before).abs().max() > 0.05, name
            merged = with_adapters.merge_and_unload()
            assert (merged(TOKENS).logits - after).abs().max() < 1e-5, name
