"""A patch turns its base into the finetuned weights and back, bit for bit, and nothing else."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.launch import run_on_ranks
from tests.support.patch_runs import (
    DTYPES,
    RANKS,
    Made,
    Model,
    N,
    V,
    bits_of,
    checkpointer,
    weights,
)
from titan_smf.checkpoint import fingerprint
from titan_smf.checkpoint.fingerprint import model_fingerprint, tensor_id
from titan_smf.checkpoint.patch import LineageStep, Patch, chain, inverse, merge
from titan_smf.checkpoint.patch_checkpoints import apply_patches, export_patch, revert_patches
from titan_smf.checkpoint.patch_file import load_patch, save_patch
from titan_smf.checkpoint.patch_model import apply_to_model, patch_of_model
from titan_smf.checkpoint.stored_weights import Rows, StoredWeights
from titan_smf.errors import CheckpointError, PatchError


def quiet(line: str) -> None: ...


def export(folder: Path, base: str, run: str) -> Patch:
    return export_patch(folder / base, folder / run, "", quiet)


def with_wrong_old_rows(patch: Patch) -> Patch:
    return dataclasses.replace(patch, old=patch.old + 1)


def refused(act: Callable[[], object]) -> str:
    """What is said to someone whose patch or checkpoint is refused."""
    with pytest.raises((PatchError, CheckpointError)) as error:
        act()
    return str(error.value)


def step(folder: Path) -> Path:
    return folder / "checkpoints/step-5"


def test_a_fingerprint_is_of_the_weights_whichever_ranks_hold_or_saved_them(
    saved: tuple[Path, Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, made = saved
    for name, (running, _) in made[1].items():
        for ranks in RANKS:
            assert made[ranks][name][0] == running
            stored = StoredWeights(step(folder / str(ranks) / name), quiet)
            assert stored.fingerprint() == running
    distinct = {running for running, _ in made[1].values()}
    assert len(distinct) == len(made[1]), "other weights, another fingerprint"
    kinds = [("a", torch.int32, (2, 3)), ("b", torch.int32, (2, 3))]
    kinds += [("a", torch.float32, (2, 3)), ("a", torch.int32, (3, 2))]
    assert len({tensor_id(*kind) for kind in kinds}) == len(kinds)
    monkeypatch.setattr(fingerprint, "BLOCK_BYTES", 4 * V * 5)
    path = step(folder / "2/float32/first")
    assert StoredWeights(path, quiet).fingerprint() == made[1]["float32/first"][0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_gives_the_finetuned_weights_and_revert_the_base_bit_for_bit(
    saved: tuple[Path, Made], dtype: str, tmp_path: Path
) -> None:
    folder, made = saved
    base, first = made[1][f"{dtype}/base"], made[1][f"{dtype}/first"]
    patches = []
    for ranks in RANKS:
        of_base = folder / str(ranks) / dtype / "base"
        of_first = folder / str(1 + ranks % 3) / dtype / "first"
        patch = export_patch(of_base, of_first, "facts", quiet)
        patches.append(patch)
        assert (patch.metadata.base, patch.metadata.result) == (base[0], first[0])
        assert patch.ids.tolist() == [0, 5, 48, N + 17, N + 48]
        applied = tmp_path / f"applied-{ranks}"
        apply_patches(of_base, [patch], applied, quiet)
        assert weights(applied) == first[1]
        for number, tuned in enumerate((applied, of_first)):
            reverted = tmp_path / f"reverted-{ranks}-{number}"
            revert_patches(tuned, [patch], reverted, quiet)
            assert weights(reverted) == base[1]
        assert sorted(file.name for file in applied.glob("*.safetensors")) == sorted(
            file.name for file in step(of_base).glob("*.safetensors")
        )
    assert not list(tmp_path.glob(".*")), "nothing unfinished stays"
    row_bytes = patch.old.element_size() * V
    for patch in patches:
        path = tmp_path / "patch.safetensors"
        save_patch(str(path), patch)
        assert path.stat().st_size < 5 * (8 + 2 * row_bytes) + 1000, "rows and a header, no table"
        again = load_patch(str(path))
        assert again.metadata == patch.metadata
        assert bits_of(again) == bits_of(patch) == bits_of(patches[0])
    assert patch.metadata.lineage == [LineageStep("", 5, "facts", base[0])]


def use_patch(
    rank: int, ranks: int, replicas: int, folder: str, output: str, dtype: str
) -> dict[str, Any]:
    """What models are that load a patched checkpoint, or are patched while they run."""
    base = step(Path(folder) / "2" / dtype / "base")
    patch = load_patch(f"{output}/first.safetensors")
    found: dict[str, Any] = {}

    loaded = Model("base", dtype).shard(replicas)
    loader = checkpointer(Path(output), loaded, dtype)
    loader.load_weights(Path(output) / "step-7")
    found["loaded"] = model_fingerprint(loaded), loaded.bits()
    found["resumed"] = refused(lambda: loader.load(7))

    running = Model("base", dtype).shard(replicas)
    checkpointer(Path(output), running, dtype).load_weights(base)
    before = running.bits()
    wrong_rows = with_wrong_old_rows(patch)
    for name, wrong in (("wrong base", inverse(patch)), ("wrong rows", wrong_rows)):
        found[name] = refused(lambda wrong=wrong: apply_to_model(running, wrong))  # type: ignore[misc]
        assert running.bits() == before, "refused before anything changes"
    apply_to_model(running, patch)
    found["running"] = model_fingerprint(running), running.bits()

    changed = []
    for index, table in enumerate(running.value_tables()):
        start, stop = table.row_range
        slots, old, _ = patch.rows_of(index, start, stop)
        if start < stop and index == 0 and not (slots == start + 1).any():
            extra = torch.tensor([start + 1]) if stop > start + 1 else slots[:0]
            slots = torch.cat([slots, extra])  # a row that was selected but did not change
            old = torch.cat([old, table.local_values()[extra - start]])
            order = slots.argsort()
            slots, old = slots[order], old[order]
        changed.append((slots, old))
    made = patch_of_model(running, changed, patch.metadata.base, patch.metadata.lineage)
    assert (made is None) == (rank != 0)
    if made is not None:
        assert made.metadata == patch.metadata
        assert bits_of(made) == bits_of(patch)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_running_models_take_a_patched_checkpoint_or_the_patch_itself(
    saved: tuple[Path, Made], dtype: str, tmp_path: Path
) -> None:
    folder, made = saved
    first, base = made[1][f"{dtype}/first"], made[1][f"{dtype}/base"]
    patch = export(folder / "3" / dtype, "base", "first")
    save_patch(str(tmp_path / "first.safetensors"), patch)
    apply_patches(folder / "3" / dtype / "base", [patch], tmp_path / "step-7", quiet)
    for ranks, replicas in ((1, 1), (4, 1), (4, 2)):
        for found in run_on_ranks(use_patch, ranks, replicas, str(folder), str(tmp_path), dtype):
            assert found["loaded"] == first
            assert found["running"] == first
            assert base[0] in found["wrong base"]
            assert first[0] in found["wrong base"]
            assert "do not have the old values of the patch" in found["wrong rows"]
            assert "step-7: holds weights alone" in found["resumed"]


def test_chained_patches_are_one_patch(saved: tuple[Path, Made], tmp_path: Path) -> None:
    folder, made = saved[0] / "2/float32", saved[1][1]
    base, second = made["float32/base"], made["float32/second"]
    one, two = export(folder, "base", "first"), export(folder, "first", "second")
    merged, overlap = merge([one, two], "refuse")
    assert not len(overlap), "a chain has an order"
    assert merged.ids.tolist() == [0, 30, 48, N + 17, N + 48], "slot 5 has its old value again"
    assert bits_of(merged) == bits_of(export(folder, "base", "second"))
    assert (merged.metadata.base, merged.metadata.result) == (base[0], second[0])
    assert [step.parent for step in merged.metadata.lineage] == [base[0], one.metadata.result]
    for number, patches in enumerate(([one, two], [merged])):
        apply_patches(folder / "base", patches, tmp_path / f"a{number}", quiet)
        revert_patches(folder / "second", patches, tmp_path / f"r{number}", quiet)
        assert weights(tmp_path / f"a{number}") == second[1]
        assert weights(tmp_path / f"r{number}") == base[1]
    nothing = chain([one, inverse(one)])
    assert not len(nothing.ids)
    assert nothing.metadata.result == nothing.metadata.base
    with pytest.raises(PatchError, match=r"patch 2 changes weights .* in the order"):
        chain([two, one])
    with pytest.raises(PatchError, match="patch 2 is of another base"):
        merge([two, one], "last")
    with pytest.raises(PatchError, match="patch 2 has old values that"):
        chain([one, with_wrong_old_rows(two)])


def test_patches_of_one_base_merge_and_overlap_needs_a_policy(
    saved: tuple[Path, Made], tmp_path: Path
) -> None:
    folder = saved[0] / "2/float32"
    one, two = export(folder, "base", "first"), export(folder, "base", "sibling")
    apart = export(folder, "base", "apart")
    old = one.old[0]
    for patches in ([one, apart, two], [two, apart, one]):
        with pytest.raises(PatchError, match=r"patch 3 changes 1 slots \(0\) that"):
            merge(patches, "refuse")
        last, overlap = merge(patches, "last")
        assert overlap.tolist() == [0]
        assert last.ids.tolist() == [0, 5, 48, N + 1, N + 3, N + 17, N + 48]
        assert torch.equal(last.new[0], patches[-1].new[0])
        total, _ = merge(patches, "sum")
        assert total.ids.tolist() == last.ids.tolist()
        torch.testing.assert_close(total.new[0], one.new[0] + two.new[0] - old)
        for number, merged in enumerate((last, total)):
            output = tmp_path / f"{len(list(tmp_path.iterdir()))}-{number}"
            apply_patches(folder / "base", [merged], output, quiet)
            stored = StoredWeights(output, quiet)
            assert stored.fingerprint() == merged.metadata.result
            values = stored.tensors["model.tables.1.values"].rows(torch.tensor([1, 3, 17]).numpy())
            expected = torch.tensor([[5.0] * 3, [6.0] * 3, [7.0] * 3])
            assert values.tobytes() == expected.numpy().tobytes()
    alone, overlap = merge([one, apart], "refuse")
    assert len(alone.ids) == 6
    assert not len(overlap)


def test_weights_that_are_not_the_patchs_are_refused_and_nothing_is_written(
    saved: tuple[Path, Made], tmp_path: Path
) -> None:
    folder, made = saved[0] / "3/float32", saved[1][1]
    patch = export(folder, "base", "first")
    about, other = patch.metadata, made["float32/sibling"][0]
    output = tmp_path / "output"

    def apply(base: Path, patch: Patch = patch) -> None:
        apply_patches(base, [patch], output, quiet)

    lying = with_wrong_old_rows(patch)
    wrong_rows = "model.tables.0.values: 3 slots (0, 5, 48) do not have the old values"
    sizes = ["model.rows is float32 [7, 5] in", "float32 [7, 6] in"]
    cases: list[tuple[Callable[[], object], list[str]]] = [
        (lambda: apply(folder / "sibling"), [other, about.base]),
        (
            lambda: revert_patches(folder / "sibling", [patch], output, quiet),
            [other, about.result],
        ),
        (lambda: apply(folder / "first"), ["they are already those that it leads to"]),
        (lambda: apply(folder / "base", lying), [wrong_rows]),
        (lambda: apply(folder / "no"), ["no: no complete checkpoint there; give a run's folder"]),
        (lambda: export(folder, "base", "other"), ["model.columns differs between"]),
        (lambda: export(folder, "base", "wider"), sizes),
        (lambda: export(saved[0], "3/float32", "bfloat16"), ["no complete checkpoint there"]),
    ]
    for act, words in cases:
        message = refused(act)
        assert all(part in message for part in words), message
        assert not list(tmp_path.iterdir()), "nothing is written"
    output.mkdir()
    assert "output: exists; give the name of a new folder" in refused(
        lambda: apply(folder / "base")
    )


def test_a_file_that_is_torn_or_changed_is_no_patch(
    saved: tuple[Path, Made], tmp_path: Path
) -> None:
    path = tmp_path / "patch.safetensors"
    patch = export(saved[0] / "1/float32", "base", "first")
    save_patch(str(path), patch)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")

    def said_of(changed: bytes) -> str:
        path.write_bytes(changed)
        message = refused(lambda: load_patch(str(path)))
        assert str(path) in message
        return message

    for size in (0, 7, 8, 100, header, len(content) - 1):
        assert "is no patch, or a torn one" in said_of(content[:size])
    assert "torn one" in said_of(content + b"\0")
    flipped = bytearray(content)
    for byte in range(header, len(content), 7):
        flipped[byte] ^= 1
        assert "is damaged" in (said := said_of(bytes(flipped))) or "torn one" in said
        flipped[byte] ^= 1
    for digits in (patch.metadata.base, patch.metadata.result):
        assert "is damaged" in said_of(content.replace(digits.encode(), b"0" * 32))
    assert "has format 9, this version reads 1" in said_of(
        content.replace(b'{\\"format\\": 1', b'{\\"format\\": 9')
    )
    path.write_bytes(content)
    assert bits_of(load_patch(str(path))) == bits_of(patch)
    with pytest.raises(PatchError, match=r"beside it there is patch\.safetensors"):
        load_patch(str(tmp_path / "pach.safetensors"))


def test_rows_change_in_a_tensor_that_is_split_by_columns_too(
    saved: tuple[Path, Made], tmp_path: Path
) -> None:
    stored = StoredWeights(step(saved[0] / "3/float32/base"), quiet)
    whole = stored.tensors["model.columns"].rows(np.arange(4))
    new = whole[[1, 3]] ^ np.uint8(1)
    changes: dict[str, Rows] = {"model.columns": (np.array([1, 3]), new)}
    stored.write(tmp_path / "step-1", changes.get, {})
    written = StoredWeights(tmp_path / "step-1", quiet)
    whole[[1, 3]] = new
    for name, tensor in written.tensors.items():
        numbers = np.arange(tensor.shape[0])
        expected = whole if name in changes else stored.tensors[name].rows(numbers)
        assert (tensor.rows(numbers) == expected).all(), name
