"""On a GPU: lookups and training agree with the CPU. Run by `tools/test.sh -m gpu`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.training_runs import CONFIGS, SHORT, arguments, metrics
from titan_smf.model.value_table import ValueTable

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)]
)
def test_lookup_and_gradients_are_the_cpus(dtype: torch.dtype, rounding: float) -> None:
    T, K, N, V = 64, 16, 1000, 32
    slots = torch.randint(N, (T, K))
    weights, upstream = torch.rand(T, K, dtype=dtype), torch.randn(T, V, dtype=dtype)
    counted = torch.rand(T) < 0.8
    results = []
    for device in ("cpu", "cuda"):
        table = ValueTable(N, V, dtype).to(device)
        table.init_weights(seed=0)
        of_device = weights.clone().to(device).requires_grad_()  # a leaf on both
        output, accesses = table(slots.to(device), of_device, counted.to(device))
        output.backward(upstream.to(device))
        assert table.values.grad is not None
        assert of_device.grad is not None
        results.append((output, table.values.grad, of_device.grad, accesses.sort().values))
    for on_cpu, on_gpu in zip(*results, strict=True):
        torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=rounding, atol=rounding)


@pytest.mark.parametrize(
    ("name", "precision", "rounding"),
    [
        ("debug_pretrain", "float32", 1e-3),
        ("debug_pretrain", "bfloat16", 0.05),
        ("debug_sparse_ft", "float32", 0.01),  # a slot at the border may be another
    ],
)
def test_training_gives_the_cpus_losses(
    name: str, precision: str, rounding: float, tmp_path: Path
) -> None:
    for device, visible in (("cpu", ""), ("gpu", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))):
        settings = SHORT | {
            "job.config": CONFIGS / f"{name}.toml",
            "training.mixed_precision_param": precision,
        }
        words = arguments(tmp_path / device, settings)
        subprocess.run(
            [sys.executable, "-m", "titan_smf.train", *words],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": visible},
            check=True,
            timeout=300,
        )
    on_cpu = metrics(tmp_path / "cpu")
    assert metrics(tmp_path / "gpu") == pytest.approx(on_cpu, abs=rounding)
