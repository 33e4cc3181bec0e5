"""Access counts and usage figures equal numpy's, for any split of rows and any replicas."""

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from titan_smf.sparse.accesses import (
    OwnedSlots,
    count_accesses,
    slots_used_fraction,
    touched_slots,
    usage_kl,
)

N = 11


def test_counts_equal_bincount() -> None:
    counts, accesses = torch.zeros(N, dtype=torch.int64), torch.randint(N, (3, 40))
    for part in (accesses[0].int(), accesses[1:], accesses[0, :0]):
        count_accesses(part, counts)
    assert counts.tolist() == np.bincount(accesses.flatten(), minlength=N).tolist()


def test_usage_of_even_single_and_no_accesses() -> None:
    even = torch.full((N,), 3)
    assert slots_used_fraction(even) == 1
    assert usage_kl(even) == pytest.approx(0, abs=1e-12)
    single = torch.zeros(N, dtype=torch.int64)
    assert (slots_used_fraction(single), usage_kl(single)) == (0, 0)
    single[4] = 9
    assert slots_used_fraction(single) == 1 / N
    assert usage_kl(single) == pytest.approx(np.log(N))


def check_usage_over_shards_and_replicas_equals_numpy(mesh: DeviceMesh) -> None:
    """Replica r of two sees accesses r::2; each of its two ranks owns some rows."""
    accesses = np.minimum(np.random.default_rng(0).geometric(0.3, size=30) - 1, N - 1)
    share = np.bincount(accesses, minlength=N) / len(accesses)
    used = share[share > 0]
    expected = len(used) / N, float((used * np.log(used * N)).sum())
    start, stop = (0, 6) if mesh.get_local_rank("fsdp") == 0 else (6, N)
    mine = accesses[mesh.get_local_rank("dp_replicate") :: 2]
    counts = torch.zeros(stop - start, dtype=torch.int64)
    count_accesses(torch.from_numpy(mine[(mine >= start) & (mine < stop)] - start), counts)
    before = counts.clone()
    groups = mesh.get_group("fsdp"), mesh.get_group("dp_replicate")
    found = slots_used_fraction(counts, *groups), usage_kl(counts, *groups)
    assert found == pytest.approx(expected, abs=1e-12)
    assert torch.equal(counts, before), "the metrics leave the counts as they are"


def test_touched_slots_count_int32_and_int64_ids() -> None:
    big = 2**31 - 1
    touched = touched_slots(
        [torch.tensor([[big, 3], [3, 0]]), torch.tensor([3], dtype=torch.int32)]
    )
    assert touched.ids.tolist() == [0, 3, big]
    assert touched.counts.tolist() == [1, 3, 1]
    assert touched.ids.dtype == touched.counts.dtype == torch.int64


def test_owned_slots_number_rows_of_all_tables() -> None:
    owned = OwnedSlots(10, 4, 7, num_tables=3)
    ids = torch.cat([owned.ids(torch.arange(3), table) for table in range(3)])
    assert ids.tolist() == [4, 5, 6, 14, 15, 16, 24, 25, 26]
    assert owned.positions(ids).tolist() == list(range(len(owned)))
