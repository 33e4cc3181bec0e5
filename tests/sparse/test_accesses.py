"""Access counts and usage figures equal numpy's, for any split of rows and any replicas."""

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from tests.support.launch import run_on_ranks
from titan_smf.sparse.accesses import AccessCounter, slots_used_fraction, usage_kl

N = 11


def numpy_usage(accesses: np.ndarray) -> tuple[float, float]:
    share = np.bincount(accesses, minlength=N) / len(accesses)
    used = share[share > 0]
    return len(used) / N, float((used * np.log(used * N)).sum())


def test_counts_equal_bincount_and_reset() -> None:
    counter = AccessCounter(N, "cpu")
    accesses = torch.randint(N, (3, 40))
    counter.add(accesses[0].int())
    counter.add(accesses[1:])
    counter.add(accesses[0, :0])
    assert counter.counts.tolist() == np.bincount(accesses.flatten(), minlength=N).tolist()
    counter.reset()
    assert counter.counts.sum() == 0


def test_usage_of_even_single_and_no_accesses() -> None:
    even = torch.full((N,), 3)
    assert slots_used_fraction(even) == 1
    assert usage_kl(even) == pytest.approx(0, abs=1e-12)
    single = torch.zeros(N, dtype=torch.int64)
    assert (slots_used_fraction(single), usage_kl(single)) == (0, 0)
    single[4] = 9
    assert slots_used_fraction(single) == 1 / N
    assert usage_kl(single) == pytest.approx(np.log(N))


def usage_on_mesh(rank: int, world_size: int) -> tuple[float, float]:
    """Replica r of two sees accesses r::2; each of its two ranks owns some rows."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "fsdp"))
    replica, shard = rank // 2, rank % 2
    accesses = skewed_accesses()[replica::2]
    start, stop = (0, 6) if shard == 0 else (6, N)
    counter = AccessCounter(stop - start, "cpu")
    counter.add(torch.from_numpy(accesses[(accesses >= start) & (accesses < stop)] - start))
    before = counter.counts.clone()
    groups = mesh.get_group("fsdp"), mesh.get_group("dp_replicate")
    result = slots_used_fraction(counter.counts, *groups), usage_kl(counter.counts, *groups)
    assert torch.equal(counter.counts, before), "the metrics leave the counts as they are"
    return result


def skewed_accesses() -> np.ndarray:
    return np.minimum(np.random.default_rng(0).geometric(0.3, size=30) - 1, N - 1)


def test_usage_over_shards_and_replicas_equals_numpy() -> None:
    for result in run_on_ranks(usage_on_mesh, 4):
        assert result == pytest.approx(numpy_usage(skewed_accesses()), abs=1e-12)
