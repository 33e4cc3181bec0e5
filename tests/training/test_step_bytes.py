"""What a sparse step receives from other ranks follows a formula without the table's size."""

from collections import Counter
from pathlib import Path

import pytest

from tests.support.launch import run_on_ranks
from tests.support.training_runs import SPARSE_FT, Settings, build

N_KEYS = (48, 96, 192)
TOP_T = 60
SETTINGS: Settings = SPARSE_FT | {
    "stream.path": "",  # documents without padding: every token counts
    "data.sources": '[{ path = "synthetic:world?facts=300" }]',
    "memory.k": 24,  # so that nearly every token needs every owner, whatever its slots
    "training.local_batch_size": 2,
    "training.global_batch_size": 16,
    "training.steps": 2,
    "selection.top_t": TOP_T,
    "checkpoint.enable": "false",
    "metrics.enable_tensorboard": "false",
}


def received(rank: int, ranks: int, folder: str) -> list[tuple[Counter[str], int]]:
    """For each size of the table the bytes of a step by collective, and the lookups' own count."""
    from titan_smf.bench.measure import ReceivedBytes

    found = []
    for n_keys in N_KEYS:
        trainer = build(Path(folder) / str(n_keys), SETTINGS | {"memory.n_keys": n_keys})
        exchange = next(trainer.model.value_tables()).exchange
        batches = trainer.batch_generator(trainer.dataloader)
        trainer.restore()
        for step in (1, 2):
            trainer.step = step
            before = exchange.bytes_received
            with ReceivedBytes() as collectives:
                trainer.train_step(batches)
        found.append((collectives.received, exchange.bytes_received - before))
        trainer.close()
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_of_a_step_do_not_depend_on_the_size_of_the_table(ranks: int, tmp_path: Path) -> None:
    from titan_smf.bench.step import sparse_step_bytes

    results = run_on_ranks(received, ranks, str(tmp_path), timeout=240)
    T, K, V, micro_batches = 2 * 128, 4 * 24, 64, 16 // (2 * ranks)
    expected = sparse_step_bytes(T, K, V, ranks, 4, TOP_T, micro_batches)
    for size, n_keys in enumerate(N_KEYS):
        of_ranks = [result[size] for result in results]
        for collectives, of_lookups in of_ranks:
            assert collectives["alltoall_base_"] == of_lookups, "each exchange is counted"
            dense = collectives["_allgather_base_"]  # FSDP's, of frozen weights
            assert dense > 0
            assert set(collectives) <= {
                "alltoall_base_",
                "allgather_",
                "allreduce_",
                "_allgather_base_",
            }, "no gradient of a frozen weight travels"
        own = [collectives.total() - collectives["_allgather_base_"] for collectives, _ in of_ranks]
        assert sum(own) / ranks == pytest.approx(expected, rel=0.02), n_keys
