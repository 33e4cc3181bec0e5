"""Small runs of a model with value tables, saved by several ranks: for the tests of patches."""

import json
from pathlib import Path
from typing import Any

import safetensors
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from titan_smf.checkpoint.checkpointer import Checkpointer
from titan_smf.checkpoint.fingerprint import model_fingerprint
from titan_smf.checkpoint.patch import Patch
from titan_smf.model.value_table import ValueTable

N, V = 49, 3  # slots of a table: unevenly on 2, 3 and 4 ranks
DTYPES = ["float32", "bfloat16"]
RANKS = [1, 2, 3]

Rows = dict[tuple[int, int], list[float]]
# What a run sets rows (table, slot) to, on top of the run or base before it.
RUNS: dict[str, tuple[str, Rows]] = {
    "base": ("", {(0, 5): [0.0, 1.0, 2.0]}),
    "first": (
        "base",
        {
            (0, 0): [1.0, 2.0, 3.0],
            (0, 5): [-0.0, 1.0, 2.0],  # another zero: equal as a number
            (0, 48): [float("nan"), 0.0, 0.0],
            (1, 17): [7.0, 7.0, 7.0],
            (1, 48): [8.0, 8.0, 8.0],
        },
    ),
    "second": (
        "first",
        {
            (0, 5): [0.0, 1.0, 2.0],  # as in the base
            (0, 30): [4.0, 4.0, 4.0],
            (1, 17): [7.0, 7.0, 7.03125],  # the next larger bfloat16
        },
    ),
    "sibling": ("base", {(0, 0): [1.5, 2.5, 3.5], (1, 3): [6.0, 6.0, 6.0]}),
    "apart": ("base", {(1, 1): [5.0, 5.0, 5.0]}),
    "other": ("base", {}),  # a weight beside the tables differs
    "wider": ("base", {}),  # of another shape
}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.flatten().view(torch.uint8).numpy().tobytes()


def bits_of(patch: Patch) -> list[bytes]:
    return [bits(tensor) for tensor in (patch.ids, patch.old, patch.new)]


class Model(nn.Module):
    """Two value tables beside weights that are split by rows, by columns, and not at all."""

    def __init__(self, run: str, dtype: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        values = getattr(torch, dtype)
        self.tables = nn.ModuleList(ValueTable(N, V, values) for _ in range(2))
        self.rows = nn.Parameter(torch.randn(7, 6 if run == "wider" else 5))
        self.columns = nn.Parameter(torch.randn(4, 6))
        self.norm = nn.Parameter(torch.randn(5))
        self.register_buffer("scale", torch.tensor(3.0))
        for number, table in enumerate(self.value_tables()):
            table.init_weights(number)
        if run == "other":
            with torch.no_grad():
                self.columns[3, 5] += 1

    def value_tables(self) -> list[ValueTable]:
        return [table for table in self.tables if isinstance(table, ValueTable)]

    def shard(self, replicas: int = 1) -> "Model":
        shards = dist.get_world_size() // replicas
        mesh = init_device_mesh("cpu", (replicas, shards) if replicas > 1 else (shards,))
        copies = [Replicate()] * (mesh.ndim - 1)
        for table in self.value_tables():
            table.shard(mesh)
        for name, dim in (("rows", 0), ("columns", 1)):
            whole = getattr(self, name).detach()
            setattr(self, name, nn.Parameter(distribute_tensor(whole, mesh, [*copies, Shard(dim)])))
        return self

    @torch.no_grad()
    def set_rows(self, rows: Rows) -> None:
        for (index, slot), values in rows.items():
            table = self.value_tables()[index]
            start, stop = table.row_range
            if start <= slot < stop:
                table.local_values()[slot - start] = torch.tensor(values)

    def bits(self) -> dict[str, bytes]:
        """All weights, whole."""
        state = self.state_dict()
        return {
            name: bits(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
            for name, tensor in state.items()
        }


class State:
    """A part of a run's state."""

    def __init__(self, **state: Any) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = state_dict


def checkpointer(folder: Path, model: Model, dtype: str) -> Checkpointer:
    moments = State(moments=torch.zeros_like(model.value_tables()[0].values))  # one for each row
    identity = {"weights": {"dtype": dtype}}
    return Checkpointer(folder, model, moments, {"data": State(position=3)}, identity, keep=0)


def all_rows(run: str) -> Rows:
    before, rows = RUNS[run]
    return (all_rows(before) if before else {}) | rows


def make_runs(rank: int, ranks: int, folder: str) -> dict[str, tuple[str, dict[str, bytes]]]:
    """Saves the checkpoints of all runs; their fingerprints and weights."""
    made = {}
    for dtype in DTYPES:
        for run in RUNS:
            model = Model(run, dtype).shard()
            model.set_rows(all_rows(run))
            path = Path(folder) / str(ranks) / dtype / run / "checkpoints"
            checkpointer(path, model, dtype).save(5)
            made[f"{dtype}/{run}"] = model_fingerprint(model), model.bits()
    return made


Made = dict[int, dict[str, tuple[str, dict[str, bytes]]]]


def weights(path: Path) -> dict[str, bytes]:
    """All weights of a checkpoint by themselves, by a one-rank reader that knows only files."""
    found: dict[str, list[tuple[list[int], Tensor]]] = {}
    for file in path.glob("*.safetensors"):
        with safetensors.safe_open(file, "pt") as stored:
            places = json.loads(stored.metadata()["DCP_SHARDING_INFO"])
            for name in stored.keys():  # noqa: SIM118
                assert name.startswith("model."), "nothing but weights"
                place = places[name]["saved_offsets"]
                found.setdefault(name[6:], []).append((place, stored.get_tensor(name)))
    whole = {}
    for name, parts in found.items():
        parts.sort(key=lambda part: part[0])
        dim = 1 if any(any(place[1:]) for place, _ in parts) else 0
        whole[name] = bits(torch.cat([part for _, part in parts], dim))
    return whole
