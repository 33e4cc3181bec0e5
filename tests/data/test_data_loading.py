"""One global order of samples for any number of ranks, resumable anywhere; sources by path."""

import itertools
import json
import multiprocessing
import random
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.support.corpora import write_all_kinds
from titan_smf.data import packing
from titan_smf.data.loader import Batch, TokenLoader, WeightedShards, validation_batches
from titan_smf.data.sources import open_source
from titan_smf.data.token_shards import TokenShards, write_shards
from titan_smf.data.tokenizer import Tokenizer, load_tokenizer, train_rank_file
from titan_smf.errors import CheckpointError, ConfigError, DataError

SEQ_LEN = 16

Sample = tuple[int, ...]


def make_shards(folder: Path, tokenizer: Tokenizer, marker: str, num_documents: int) -> TokenShards:
    """Shards in which every window is different from every other, here and elsewhere."""
    documents = (f"{marker}{number:04d}" * (1 + number % 4) for number in range(num_documents))
    write_shards(str(folder), tokenizer, documents, shard_tokens=200)
    return TokenShards(str(folder))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> list[WeightedShards]:
    folder = tmp_path_factory.mktemp("sources")
    return [
        WeightedShards(name, make_shards(folder / name, tokenizer, name, documents), weight)
        for name, documents, weight in (("a", 60, 5.0), ("b", 31, 2.0), ("c", 7, 1.0))
    ]


def loader(
    sources: list[WeightedShards], batch_size: int, rank: int = 0, num_ranks: int = 1, seed: int = 3
) -> TokenLoader:
    return TokenLoader(sources, SEQ_LEN, batch_size, rank, num_ranks, seed)


def samples_of(batch: Batch) -> list[Sample]:
    """The samples of a batch, without surplus rows."""
    inputs, labels = batch[0]["input"], batch[1]
    assert inputs.dtype == labels.dtype == torch.int64
    assert inputs.shape == labels.shape == (len(labels), SEQ_LEN)
    used = (labels != -100).all(dim=1)
    assert (labels[~used] == -100).all()
    assert (inputs[used, 1:] == labels[used, :-1]).all()
    return [tuple(row) for row in torch.cat([inputs, labels[:, -1:]], dim=1)[used].tolist()]


def take(loaders: list[TokenLoader], num_batches: int) -> list[Sample]:
    """The samples of the next batches of all ranks, in global order."""
    ranks = [iter(each) for each in loaders]
    batches = [next(rank) for _ in range(num_batches) for rank in ranks]
    return [sample for batch in batches for sample in samples_of(batch)]


def all_windows(shards: TokenShards) -> list[Sample]:
    stream = shards.tokens(0, shards.num_tokens).tolist()
    starts = range(0, len(stream) - SEQ_LEN, SEQ_LEN)
    return [tuple(stream[start : start + SEQ_LEN + 1]) for start in starts]


def test_permute_is_a_permutation_of_any_size() -> None:
    for size in [*range(1, 70), 127, 128, 129, 1000, 4097]:
        seen = packing.permute(range(size), size, "key").tolist()
        assert sorted(seen) == list(range(size))
        assert packing.permute([size - 1], size, "key").tolist() == seen[-1:]
    positions = [0, 1, 10**12 - 1]
    far = packing.permute(positions, 10**12, "key")
    assert len(set(far.tolist())) == 3
    assert (far < 10**12).all()


def test_permutations_of_different_keys_look_independent() -> None:
    """Over many keys every value comes equally often to every place, and no order is favoured."""
    num_keys, size = 4000, 5
    results = [
        tuple(packing.permute(range(size), size, str(key)).tolist()) for key in range(num_keys)
    ]
    for place, value in itertools.product(range(size), repeat=2):
        count = sum(result[place] == value for result in results)
        assert abs(count - num_keys / size) < 6 * (num_keys / size) ** 0.5
    assert len(set(results)) == 120
    long = packing.permute(range(10_000), 10_000, "one key")
    steps = (long[1:] - long[:-1]).astype(float)
    assert abs((steps > 0).mean() - 0.5) < 0.02, "neighbours are not sent to neighbours"
    assert len(set(steps.tolist())) > 5_000


@pytest.mark.parametrize(
    "weights",
    [[1.0], [1.0, 1.0], [0.7, 0.2, 0.1], [5.0, 2.0, 1.0], [1e-3, 1.0, 3.3, 0.5, 0.5, 2.0]],
)
def test_mixture_is_exact_to_one_sample_at_any_time(weights: list[float]) -> None:
    drawn, integers = [0] * len(weights), packing.integer_weights(weights)
    for step in range(1, 5001):
        _, drawn = packing.mix(drawn, integers, 1)
        for count, weight in zip(drawn, weights, strict=True):
            assert abs(count - step * weight / sum(weights)) < 1
    assert packing.mix([0] * len(weights), integers, 5000)[1] == drawn


def test_every_sample_once_per_epoch_in_a_new_order(sources: list[WeightedShards]) -> None:
    expected = all_windows(sources[0].shards)
    assert len(set(expected)) == len(expected), "the windows can be told apart"
    assert len(expected) % 7, "batches span epochs"
    samples = take([loader(sources[:1], batch_size=7)], num_batches=len(expected))
    epochs = [samples[i : i + len(expected)] for i in range(0, len(samples), len(expected))]
    assert all(sorted(epoch) == sorted(expected) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, expected]}) == len(epochs) + 1
    other_seed = take([loader(sources[:1], batch_size=7, seed=4)], num_batches=5)
    assert other_seed != samples[: len(other_seed)]


def test_only_whole_samples_are_drawn(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for num_tokens, num_samples in ((2 * SEQ_LEN, 1), (2 * SEQ_LEN + 1, 2), (3 * SEQ_LEN, 2)):
        folder = str(tmp_path / str(num_tokens))
        write_shards(folder, tokenizer, ["".join(chr(32 + i) for i in range(num_tokens - 2))])
        source = WeightedShards("s", TokenShards(folder))
        assert len(set(take([loader([source], batch_size=1)], num_batches=6))) == num_samples
        assert len(list(validation_batches(source.shards, SEQ_LEN, 1, 0, 1))) == num_samples


def test_mixture_draws_each_source_in_its_own_order(sources: list[WeightedShards]) -> None:
    owner = {w: source.name for source in sources for w in all_windows(source.shards)}
    samples = take([loader(sources, batch_size=8)], num_batches=50)
    assert Counter(owner[sample] for sample in samples) == {"a": 250, "b": 100, "c": 50}
    size = len(all_windows(sources[2].shards))
    of_c = [sample for sample in samples if owner[sample] == "c"]
    assert all(len(set(of_c[i : i + size])) == size for i in range(0, len(of_c) - size, size))


def test_order_is_the_same_for_any_number_of_ranks(sources: list[WeightedShards]) -> None:
    reference = take([loader(sources, batch_size=12)], num_batches=20)
    for num_ranks in (2, 3, 4):
        ranks = [loader(sources, 12 // num_ranks, rank, num_ranks) for rank in range(num_ranks)]
        assert take(ranks, num_batches=20) == reference
        states = [json.dumps(rank.state_dict()) for rank in ranks]
        assert len(set(states)) == 1, "the state is the same on every rank"


def test_resume_anywhere_with_any_ranks_and_batch_size(sources: list[WeightedShards]) -> None:
    reference = take([loader(sources, batch_size=1)], num_batches=700)
    draws = random.Random(0)
    for _ in range(25):
        position, ranks = 0, [loader(sources, batch_size=5)]
        while position < 400:
            num_batches = draws.randrange(1, 9)
            samples = take(ranks, num_batches)
            assert samples == reference[position : position + len(samples)]
            position += len(samples)
            state = json.loads(json.dumps(ranks[-1].state_dict()))
            num_ranks, batch_size = draws.randrange(1, 5), draws.randrange(1, 8)
            ranks = [loader(sources, batch_size, rank, num_ranks) for rank in range(num_ranks)]
            for rank in ranks:
                rank.load_state_dict(state)


def test_resuming_with_other_data_says_what_differs(
    sources: list[WeightedShards], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    state = loader(sources, batch_size=4).state_dict()
    grown = WeightedShards("a", make_shards(tmp_path / "grown", tokenizer, "a", 61), 5.0)
    heavier = WeightedShards("b", sources[1].shards, 9.0)
    for other, message in [
        ([grown, *sources[1:]], "tokens of source 1 is [0-9]+ here and [0-9]+ in the checkpoint"),
        ([sources[0], heavier, sources[2]], "weight of source 2 is 9.0 here and 2.0 in the check"),
        ([sources[1], sources[0], sources[2]], "digest of source 1 is [0-9a-f]+ here and"),
        (sources[:2], "tokens of source 3 is absent here and [0-9]+ in the checkpoint"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            loader(other, batch_size=4).load_state_dict(state)
    with pytest.raises(CheckpointError, match="seed is 4 here and 3 in the checkpoint"):
        loader(sources, batch_size=4, seed=4).load_state_dict(state)
    with pytest.raises(CheckpointError, match="seq_len is 8 here and 16 in the checkpoint"):
        TokenLoader(sources, 8, 4, 0, 1, 3).load_state_dict(state)


def test_data_that_moved_is_resumed(
    sources: list[WeightedShards], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    before = loader(sources[:1], batch_size=4)
    take([before], num_batches=3)
    moved = WeightedShards("elsewhere", make_shards(tmp_path / "moved", tokenizer, "a", 60), 5.0)
    after = loader([moved], batch_size=4)
    after.load_state_dict(before.state_dict())
    assert take([after], 5) == take([before], 5)


def test_unusable_sources_are_refused_at_once(
    sources: list[WeightedShards], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    short = WeightedShards("short", make_shards(tmp_path / "short", tokenizer, "s", 1))
    with pytest.raises(DataError, match="short: its 7 tokens are fewer than one sample of 17"):
        loader([sources[0], short], batch_size=2)
    with pytest.raises(DataError, match="its 7 tokens are fewer than one sample of 17"):
        validation_batches(short.shards, SEQ_LEN, 2, 0, 1)
    with pytest.raises(ConfigError, match="at least one source"):
        loader([], batch_size=2)
    with pytest.raises(ConfigError, match="each source once"):
        loader([sources[0], sources[0]], batch_size=2)
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="a weight above 0 for a"):
            loader([WeightedShards("a", sources[0].shards, weight)], batch_size=2)


def test_validation_samples_do_not_depend_on_the_ranks(sources: list[WeightedShards]) -> None:
    shards = sources[0].shards
    windows = all_windows(shards)
    for num_samples in (0, 1, 7, 24, len(windows), 10 * len(windows)):
        expected = min(num_samples or len(windows), len(windows))
        seen = []
        for num_ranks, batch_size in ((1, 5), (2, 5), (3, 2), (4, 3)):
            ranks = [
                list(validation_batches(shards, SEQ_LEN, batch_size, rank, num_ranks, num_samples))
                for rank in range(num_ranks)
            ]
            assert len(set(map(len, ranks))) == 1, "every rank does the same number of iterations"
            batches = [batch for batches in ranks for batch in batches]
            assert all(len(labels) == batch_size for _, labels in batches)
            seen.append(sorted(sample for batch in batches for sample in samples_of(batch)))
        assert len(seen[0]) == expected
        assert set(seen[0]) <= set(windows)
        if num_samples == 24:
            places = sorted(windows.index(sample) for sample in seen[0])
            assert places[-1] > 0.9 * len(windows), "samples come from everywhere"
        assert all(other == seen[0] for other in seen)


TEXTS = ["The first document.", "The second,\nof two lines.", "Ünïcode \u4e2d\u6587 third."]


def test_text_files_are_prepared_on_first_use(tmp_path: Path, tokenizer: Tokenizer) -> None:
    cache = tmp_path / "cache"
    expected = [tokenizer.encode(text, bos=True, eos=True) for text in TEXTS]
    files = write_all_kinds(tmp_path, TEXTS)
    for kind in set(files) - {"folder", "glob", "hub"}:
        shards = open_source(files[kind], tokenizer, cache)
        assert [shards.document(i).tolist() for i in range(3)] == expected

    folders = {path.name for path in (cache / "text").iterdir()}
    open_source(str(tmp_path / "t.txt"), tokenizer, cache)
    assert {path.name for path in (cache / "text").iterdir()} == folders, "prepared only once"
    (tmp_path / "t.txt").write_text("Changed.")
    assert open_source(str(tmp_path / "t.txt"), tokenizer, cache).num_documents == 1


def test_sources_open_by_folder_url_and_name(
    sources: list[WeightedShards], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    folder = sources[0].shards.path
    assert open_source(folder, tokenizer).digest == sources[0].shards.digest
    assert open_source(f"file://{folder}", tokenizer).digest == sources[0].shards.digest
    world = "synthetic:world?seed=1&facts=50"
    train = open_source(world, tokenizer, tmp_path)
    assert open_source(world + "&split=train", tokenizer, tmp_path).digest == train.digest
    others = [world + more for more in ("&split=validation", "&new_facts=10", "&tuning_facts=10")]
    others += [world, "synthetic:world?facts=50"]
    assert len({open_source(other, tokenizer, tmp_path).digest for other in others}) == 5


def test_the_default_cache_lies_in_the_users_cache_folder(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    open_source("synthetic:world?facts=20", tokenizer)
    assert list((tmp_path / "titan_smf" / "synthetic").glob("*/index.json"))


def open_in_process(path: str, cache: str, start: float) -> str:
    time.sleep(max(0.0, start - time.time()))
    return open_source(path, load_tokenizer("bytes"), cache).digest


def test_several_processes_may_open_an_unprepared_source_at_once(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Document {n}. " * 20 for n in range(3000)))
    cache = tmp_path / "cache"
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        for path in (str(text), "synthetic:world?facts=300"):
            start = time.time() + (1.5 if path == str(text) else 0.1)
            digests = pool.starmap(open_in_process, [(path, str(cache), start)] * 3, chunksize=1)
            assert set(digests) == {open_source(path, tokenizer, tmp_path / "alone").digest}
    assert not list(cache.rglob("*.unfinished"))


def test_unusable_paths_are_named(
    tmp_path: Path, tokenizer: Tokenizer, sources: list[WeightedShards]
) -> None:
    (tmp_path / "corpus.txt").write_text("text")
    (tmp_path / "folder").mkdir()
    broken = '{"text": "fine"}\n{"text": "torn'
    cases: list[tuple[str, str | None, str]] = [
        ("corpus.tx", None, "does not exist; beside it there is corpus.txt"),
        ("nowhere/corpus.txt", None, "does not exist"),
        ("empty.txt", "", "is empty"),
        ("empty.jsonl", "", "is empty"),
        ("blank.txt", "\n  \n\n", "no document in the input"),
        ("blank.jsonl", '{"text": " "}\n', "no document in the input"),
        ("broken.jsonl", broken, r"broken.jsonl:2: is not JSON: .*--on-bad-line skip"),
        ("folder", None, "holds no token shards; make them with tools/prepare_data.py"),
        ("words.csv", "a,b", "is of no known kind; known are txt, jsonl, parquet"),
    ]
    start = time.monotonic()
    for name, content, message in cases:
        if content is not None:
            (tmp_path / name).write_text(content)
        for _ in range(2):  # a failed attempt leaves nothing behind that hides the error
            with pytest.raises(DataError, match=message) as raised:
                open_source(str(tmp_path / name), tokenizer, tmp_path / "cache")
            assert name in str(raised.value)
    for name in ("synthetic:word", "synthetic:world?fact=3", "synthetic:world?facts=many",
                 "synthetic:world?split=test", "synthetic:world?facts=3"):  # fmt: skip
        with pytest.raises(ConfigError):
            open_source(name, tokenizer, tmp_path / "cache")
    trained = train_rank_file(["abc abc abd"], 260, str(tmp_path / "ranks"))
    with pytest.raises(DataError, match="fingerprint"):
        open_source(sources[0].shards.path, trained)
    assert time.monotonic() - start < 10


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="set XDG_CACHE_HOME"):
        open_source("synthetic:world?facts=20", tokenizer, tmp_path / "file" / "cache")
