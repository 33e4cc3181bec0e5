"""df and counts are the same on any number of ranks, after a stop, and merged from parts."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tests.support.launch import run_on_ranks
from titan_smf.errors import IdfError
from titan_smf.model.value_table import ValueTable
from titan_smf.sparse.accesses import OwnedSlots, sum_over_replicas, touched_slots
from titan_smf.sparse.document_frequency import DocumentFrequency, addressing_fingerprint
from titan_smf.sparse.idf_file import (
    IdfMetadata,
    IdfModel,
    check_idf,
    check_same_count,
    load_idf,
    merge_idf,
    read_metadata,
    save_idf,
)
from titan_smf.sparse.idf_report import draw_histogram, summary, usage_warning

N = 49  # slots of a table: unevenly on 2, 3 and 4 ranks
TABLES = 2
TOKENS, K = 24, 3
DOCUMENTS = 6
COMMAND = "torchrun .* tools/compute_idf.py --job.config .* --idf.path "

MODEL = IdfModel(
    slots=N,
    tables=TABLES,
    memory_layers=[3, 5],
    tokenizer="bytes",
    tokenizer_fingerprint="t0",
    addressing_fingerprint="a0",
)


def metadata_of(first: int, stop: int, complete: bool = True) -> IdfMetadata:
    return IdfMetadata(MODEL, "wörld", 4, 6, [[first, stop]], complete)


def make_document(number: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Slots (TABLES, TOKENS, K), and which tokens count."""
    random = np.random.default_rng(number)
    slots = np.minimum(random.geometric(0.1, (TABLES, TOKENS, K)) - 1, N - 1)
    counted = random.random(TOKENS) < 0.7
    slots[:, ~counted] = N - 1 - number  # padding reads a slot of its own
    return slots, counted


def plain_counts(first: int, stop: int) -> tuple[list[int], list[int]]:
    """df and counts of all slots, from dense counts of each document."""
    df = counts = np.zeros(TABLES * N, dtype=np.int64)
    for number in range(first, stop):
        slots, counted = make_document(number)
        ids = slots[:, counted] + np.arange(TABLES).reshape(-1, 1, 1) * N
        of_document = np.bincount(ids.flatten(), minlength=TABLES * N)
        df, counts = df + (of_document > 0), counts + of_document
    return df.tolist(), counts.tolist()


class Counting:
    """A counting job on the ranks of a mesh (None: one process)."""

    def __init__(self, mesh: DeviceMesh | None) -> None:
        self.shards = self.replicas = None
        self.rank, self.world_size = 0, 1
        self.tables = [ValueTable(N, 2) for _ in range(TABLES)]
        for table in self.tables:
            torch.nn.init.zeros_(table.values)
            if mesh is not None:
                table.shard(mesh)
        if mesh is not None:
            self.shards = mesh.get_group(mesh.ndim - 1)
            self.replicas = mesh.get_group(0) if mesh.ndim == 2 else None
            self.rank, self.world_size = dist.get_rank(), mesh.size()
        self.owned = OwnedSlots(N, *self.tables[0].row_range, TABLES)
        self.frequency = DocumentFrequency(self.owned, "cpu")

    def count(self, first: int, stop: int) -> None:
        """In two micro-batches, the tokens spread over the ranks."""
        for number in range(first, stop):
            slots, counted = map(torch.from_numpy, make_document(number))
            accesses: list[Tensor] = []
            for part in (0, 1):
                mine = slice(2 * self.rank + part, None, 2 * self.world_size)
                for index, table in enumerate(self.tables):
                    of_mine = slots[index, mine]
                    _, rows = table(of_mine, of_mine.float(), counted[mine])
                    accesses.append(self.owned.ids(rows, index))
            self.frequency.add_document(sum_over_replicas(touched_slots(accesses), self.replicas))

    def save(self, path: str, metadata: IdfMetadata) -> None:
        gathered = self.frequency.gather(self.shards)
        is_first = self.shards is None or dist.get_group_rank(self.shards, dist.get_rank()) == 0
        assert (gathered is not None) == is_first, "only the first rank holds the whole"
        if gathered is not None and self.rank == 0:
            save_idf(path, *gathered, metadata)


def check_counting(rank: int, world_size: int, folder: str) -> None:
    """Each job counts half, leaves a partial file, and the next one, on other ranks, goes on."""
    before = f"{folder}/none"
    for name, layout in (("4", [0, 1, 2, 3]), ("2x2", [[0, 1], [2, 3]]), ("2", [0, 1]), ("1", [0])):
        names = ("fsdp",) if isinstance(layout[0], int) else ("dp_replicate", "fsdp")
        mesh = DeviceMesh("cpu", torch.tensor(layout), mesh_dim_names=names)
        if mesh.get_coordinate() is not None:
            whole = Counting(mesh)
            whole.count(0, DOCUMENTS)
            whole.save(f"{folder}/whole {name}", metadata_of(0, DOCUMENTS))
            if name != "4":
                resumed = Counting(mesh)
                resumed.frequency.resume(load_idf(before, resumed.owned))
                assert resumed.frequency.documents == 3
                resumed.count(3, DOCUMENTS)
                assert resumed.frequency.documents == DOCUMENTS
                resumed.save(f"{folder}/resumed {name}", metadata_of(0, DOCUMENTS))
            part = Counting(mesh)
            part.count(0, 3)
            part.save(f"{folder}/partial {name}", metadata_of(0, 3, complete=False))
        before = f"{folder}/partial {name}"
        dist.barrier()  # the file is there before other ranks read it


def whole_of(path: str) -> tuple[list[int], list[int]]:
    background = load_idf(path, OwnedSlots(N, 0, N, TABLES))
    assert background.accesses == background.counts.sum()
    return background.df.tolist(), background.counts.tolist()


def test_counts_equal_numpy_on_any_ranks_and_after_a_stop(tmp_path: Path) -> None:
    folder = tmp_path / "földer"
    run_on_ranks(check_counting, 4, str(folder))
    files = sorted(folder.iterdir())
    assert len(files) == 4 + 3 + 4
    for path in files:
        documents = 3 if path.name.startswith("partial") else DOCUMENTS
        assert whole_of(str(path)) == plain_counts(0, documents), path.name
    whole = {path.read_bytes() for path in files if not path.name.startswith("partial")}
    assert len(whole) == 1, "files are equal byte for byte"


@pytest.fixture
def job() -> Counting:
    return Counting(None)


def test_a_rank_reads_its_rows_alone(job: Counting, tmp_path: Path) -> None:
    path = str(tmp_path / "idf.safetensors")
    job.count(0, DOCUMENTS)
    job.save(path, metadata_of(0, DOCUMENTS))
    df = torch.tensor(plain_counts(0, DOCUMENTS)[0]).view(TABLES, N)
    for start, stop in ((0, 13), (13, N), (20, 21), (N, N)):
        background = load_idf(path, OwnedSlots(N, start, stop, TABLES))
        assert background.df.tolist() == df[:, start:stop].flatten().tolist()
        assert background.documents == DOCUMENTS
        assert background.accesses == sum(plain_counts(0, DOCUMENTS)[1])


def test_files_are_safetensors_and_keep_what_they_were_told(job: Counting) -> None:
    job.count(0, 2)
    for url in ("memory://idf/cöunts 1.safetensors", "memory://idf/a=b&c"):
        job.save(url, metadata_of(0, 2, complete=False))
        metadata = read_metadata(url)
        df, counts = plain_counts(0, 2)
        sums: Any = {"accesses": sum(counts), "slots_used": sum(d > 0 for d in df)}
        expected = dataclasses.replace(metadata_of(0, 2, complete=False), **sums)
        assert metadata == expected
        with fsspec.open(url) as file:
            content = file.read()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        idf = json.loads(header["__metadata__"]["idf"])
        assert idf == {"format": 1, **dataclasses.asdict(expected)}
        tensors = safetensors.torch.load(content)
        assert tensors["df"].tolist() == df
        assert tensors["counts"].tolist() == counts
        assert (tensors["df"].dtype, tensors["counts"].dtype) == (torch.int32, torch.int64)


def parts_in(folder: Path, *ranges: tuple[int, int], complete: bool = True) -> list[str]:
    paths = []
    for first, stop in ranges:
        job = Counting(None)
        job.count(first, stop)
        paths.append(str(folder / f"{first}-{stop}{'' if complete else ' partial'}"))
        job.save(paths[-1], metadata_of(first, stop, complete))
    return paths


def test_merged_parts_equal_one_job(tmp_path: Path) -> None:
    parts = parts_in(tmp_path, (4, DOCUMENTS), (0, 1), (1, 4), (0, DOCUMENTS))
    whole = parts.pop()
    merged = str(tmp_path / "merged")
    merge_idf(parts, merged)
    assert Path(merged).read_bytes() == Path(whole).read_bytes()
    merge_idf([*parts, *parts_in(tmp_path, (2, 2))], merged)
    assert Path(merged).read_bytes() == Path(whole).read_bytes(), "a part without documents"


def test_a_sum_is_complete_if_no_document_is_missing(tmp_path: Path) -> None:
    first, middle, last = parts_in(tmp_path, (0, 1), (1, 4), (4, DOCUMENTS))
    stopped, ended_early = parts_in(tmp_path, (1, 4), (4, 5), complete=False)
    merged = str(tmp_path / "merged")
    assert merge_idf([last, stopped, first], merged).complete, "another job counted on from there"
    check_idf(merged, read_metadata(merged), MODEL)
    gap = merge_idf([last, first], merged)
    assert (gap.ranges, gap.documents, gap.complete) == ([[0, 1], [4, DOCUMENTS]], 3, False)
    assert load_idf(merged, OwnedSlots(N, 0, N, TABLES)).documents == 3
    lacking = r"lacks the documents 1 to 3; .*--idf\.first_batch 1 --idf\.num_batches 3"
    with pytest.raises(IdfError, match=rf"merged: is not complete: it {lacking}"):
        check_idf(merged, gap, MODEL)
    assert not merge_idf([first, middle, ended_early], merged).complete


def test_a_partial_file_is_no_background(tmp_path: Path) -> None:
    path = str(tmp_path / "idf.safetensors.partial")
    message = r"it holds 3 documents of a count that was stopped; start .* --idf\.path \S+tensors$"
    with pytest.raises(IdfError, match=rf"partial: is not complete: {message}"):
        check_idf(path, metadata_of(0, 3, complete=False), MODEL)


def test_merge_refuses_common_documents_and_other_settings(tmp_path: Path) -> None:
    a, b, c = parts_in(tmp_path, (0, 3), (2, 4), (4, 5))
    target = tmp_path / "merged"
    with pytest.raises(IdfError, match=r"2-4: counts documents 2 to 2, which .*0-3 counts too"):
        merge_idf([c, b, a], str(target))
    with pytest.raises(IdfError, match=r"4-5: counts documents 4 to 4, which .*4-5 counts too"):
        merge_idf([c, c], str(target))
    other = dataclasses.replace(metadata_of(4, 5), batch_size=8, data="books")
    df, counts = map(torch.tensor, plain_counts(4, 5))
    save_idf(c, df, counts, other)
    message = r"4-5: counts other documents: data: the file has 'books', not 'wörld'; batch_size"
    with pytest.raises(IdfError, match=message):
        merge_idf([a, c], str(target))
    assert not target.exists()


def test_a_count_goes_on_only_with_its_own_settings() -> None:
    own = metadata_of(0, 3)
    check_same_count("x", dataclasses.replace(own, ranges=[[0, 9]], complete=False), own)
    for name, other in {
        "data": dataclasses.replace(own, data="books"),
        "batch_size": dataclasses.replace(own, batch_size=8),
        "seq_len": dataclasses.replace(own, seq_len=7),
        "slots in a table": dataclasses.replace(own, model=dataclasses.replace(MODEL, slots=50)),
    }.items():
        with pytest.raises(IdfError, match=rf"^x: counts other documents: {name}: the file has "):
            check_same_count("x", other, own)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("slots", 64, "slots in a table: the file has 64, not 49"),
        ("tables", 1, "value tables: the file has 1, not 2"),
        ("memory_layers", [3], r"memory layers: the file has \[3\], not \[3, 5\]"),
        (
            "tokenizer_fingerprint",
            "t1",
            "tokenizer: the file has bytes with fingerprint t1, not bytes with fingerprint t0",
        ),
        (
            "addressing_fingerprint",
            "a1",
            r"addressing fingerprint \(the model's keys and queries\): the file has a1, not a0",
        ),
    ],
)
def test_check_names_what_differs_and_the_command(field: str, value: object, message: str) -> None:
    path = "s3://a/my idf"
    other = dataclasses.replace(MODEL, **{field: value})  # type: ignore[arg-type]
    metadata = dataclasses.replace(metadata_of(0, 3), model=other)
    with pytest.raises(IdfError, match=rf"^{path}: does not fit this run: {message}; .*{COMMAND}'"):
        check_idf(path, metadata, MODEL)


def test_check_passes_another_name_of_the_tokenizer_and_refuses_no_documents() -> None:
    renamed = dataclasses.replace(MODEL, tokenizer="bytes from a path")
    check_idf("idf", dataclasses.replace(metadata_of(0, 3), model=renamed), MODEL)
    with pytest.raises(IdfError, match=rf"^idf: counts no document.*{COMMAND}idf"):
        check_idf("idf", metadata_of(3, 3), MODEL)


def test_missing_torn_and_foreign_files_are_refused(job: Counting, tmp_path: Path) -> None:
    path = tmp_path / "idf.safetensors"
    job.count(0, 2)
    job.save(str(path), metadata_of(0, 2))
    content = path.read_bytes()
    everything = OwnedSlots(N, 0, N, TABLES)

    def refused(content: bytes, message: str) -> None:
        path.write_bytes(content)
        with pytest.raises(IdfError, match=rf"^{re.escape(str(path))}: {message}.*{COMMAND}"):
            load_idf(str(path), everything)

    for length in range(0, len(content), 7):
        refused(content[:length], "is torn")
    refused(content[:-1], "is torn")
    refused(content + b"\0", "is torn")
    refused(b"\xff" * 100, "is torn")
    refused(safetensors.torch.save({"df": torch.zeros(3)}), "is no file of document frequencies")
    refused(content.replace(b"batch_size", b"botch_size"), "is no file of document frequencies")
    refused(content.replace(b'format\\": 1', b'format\\": 9'), "has format 9, not 1")
    refused(content.replace(b'"I32"', b'"F32"'), "is no file of document frequencies")
    df_is_last = len(content) - 4 * TABLES * N
    for wrong in (3, -1):
        damaged = bytearray(content)
        damaged[df_is_last : df_is_last + 4] = wrong.to_bytes(4, "little", signed=True)
        refused(bytes(damaged), "damaged, it has counts that 2 documents cannot have")
    path.write_bytes(content)
    with pytest.raises(IdfError, match=f"has 2 tables of 49 slots, this model 1 of 49.*{COMMAND}"):
        load_idf(str(path), OwnedSlots(N, 0, N))
    typo = str(path).replace("idf.", "idv.")
    message = rf"{typo}: does not exist; beside it there is idf.safetensors; .*{COMMAND}{typo}"
    with pytest.raises(IdfError, match=message):
        read_metadata(typo)
    with pytest.raises(IdfError, match=rf"nosuch://x: cannot be reached: .*{COMMAND}"):
        read_metadata("nosuch://x")


def test_fingerprint_changes_with_names_shapes_types_and_any_value() -> None:
    keys = torch.arange(6, dtype=torch.float32).view(2, 3)
    model = {"b.keys": keys, "a.query": keys.bfloat16(), "gain": torch.tensor(1.0)}
    base = addressing_fingerprint(model)
    assert base == addressing_fingerprint(dict(reversed(model.items())))
    assert base == addressing_fingerprint(model | {"b.keys": keys.T.contiguous().T})
    changed = keys.clone()
    changed[1, 2] = torch.nextafter(changed[1, 2], torch.tensor(9.0))
    others = [
        {"c.keys" if name == "b.keys" else name: tensor for name, tensor in model.items()},
        model | {"b.keys": keys.view(3, 2)},
        model | {"b.keys": keys.view(torch.int32)},
        model | {"b.keys": changed},
        model | {"gain": torch.tensor([1.0])},
        {"b.keys": keys},
    ]
    assert len({base, *map(addressing_fingerprint, others)}) == 1 + len(others)


def test_usage_is_warned_of_above_90_and_below_1_percent() -> None:
    def warning(used: int) -> str:
        model = dataclasses.replace(MODEL, slots=500)
        return usage_warning(dataclasses.replace(metadata_of(0, 3), model=model, slots_used=used))

    assert warning(901).startswith("90.1% of the slots occur in the 3 background documents: few")
    assert warning(9).startswith("0.9% of the slots occur in the 3 background documents: nearly")
    assert [warning(used) for used in (10, 500, 900)] == [""] * 3


def test_summary_and_picture(tmp_path: Path) -> None:
    df = torch.tensor([0] * 150 + [1] * 30 + [5] * 10 + [6] * 10, dtype=torch.int32)
    counts = df.long() * 10
    counts[-2:] = 640
    assert summary(df, counts, 10).splitlines() == [
        "documents                   10",
        "slots                       200",
        "never used                  150 (75.0%)",
        "used in more than half      10 (5.0%)",
        "quantiles of df             10% 0, 50% 0, 90% 1, 99% 6, max 6",
        "accesses                    2,560",
        "of these on the hottest 1%  50.0%",
    ]
    for documents in (0, 1, 10, 1000):
        path = tmp_path / f"{documents}.png"
        draw_histogram(df.clamp(max=documents), documents, str(path))
        assert path.read_bytes().startswith(b"\x89PNG")
    assert "accesses                    0" in summary(df * 0, counts * 0, 0)
