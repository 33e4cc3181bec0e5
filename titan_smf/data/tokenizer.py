"""Text to token ids and back: tiktoken encodings by name, by rank file, or plain bytes.

A rank file has one line per token, `base64(bytes) rank`, the lower rank merged first. It says
nothing about how text is split before merging nor about special tokens: those come from the
pattern. A pattern is one of the names below or a regular expression.

    pattern    text is split as in    special tokens, placed after the last rank
    default    Llama 3                begin, end, pad: what `train_rank_file` makes
    llama3     Llama 3                Llama 3's 256
    cl100k     cl100k_base            cl100k_base's five
    gpt2       GPT-2                  <|endoftext|>
    a regex    the regex              begin, end, pad
"""

import base64
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import regex
import tiktoken

from titan_smf import storage
from titan_smf.errors import ConfigError, DataError

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CL100K_SPLIT = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+|"
    r" ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
BYTES_SPLIT = r"[\s\S]{1,64}"

BEGIN_END_PAD = ("<|begin_of_text|>", "<|end_of_text|>", "<|pad|>")
LLAMA3_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(3, 248)),
)
LLAMA3_NUM_RANKS = 128_000
CL100K_SPECIAL = (
    *(None, "<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    *([None] * 15),
    "<|endofprompt|>",
)

BOS_NAMES = ("<|begin_of_text|>", "<|startoftext|>")
EOS_NAMES = ("<|end_of_text|>", "<|endoftext|>")
PAD_NAMES = ("<|pad|>", "<|finetune_right_pad_id|>")

# tiktoken's pattern matcher overflows its stack on about a million spaces in a row.
LONGEST_SPACE = 10_000
LONG_SPACE = re.compile(rf"\s{{{LONGEST_SPACE}}}")


@dataclass(frozen=True)
class Pattern:
    """How text is split before merging, and which special tokens follow the ranks."""

    split: str
    special: Sequence[str | None] = BEGIN_END_PAD
    """Token `i` has the id `number of ranks + i`; None leaves an id unassigned."""


PATTERNS = {
    "default": Pattern(LLAMA3_SPLIT),
    "llama3": Pattern(LLAMA3_SPLIT, LLAMA3_SPECIAL),
    "cl100k": Pattern(CL100K_SPLIT, CL100K_SPECIAL),
    "gpt2": Pattern(GPT2_SPLIT, ("<|endoftext|>",)),
}


class Tokenizer:
    """A tiktoken encoding with its begin, end and padding tokens and a fingerprint.

    Special tokens spelled out in a text are encoded as ordinary text. `bos_id` is None where the
    encoding has no begin token; `pad_id` is the end token where it has no padding token.
    """

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.name = encoding.name
        self.n_vocab = encoding.n_vocab
        self._encoding = encoding
        special = encoding._special_tokens
        self.bos_id = next((special[name] for name in BOS_NAMES if name in special), None)
        eos_id = next((special[name] for name in EOS_NAMES if name in special), None)
        if eos_id is None:
            raise DataError(f"tokenizer {self.name}: has no end token, one of {EOS_NAMES}")
        self.eos_id = eos_id
        self.pad_id = next((special[name] for name in PAD_NAMES if name in special), eos_id)
        self.fingerprint = _fingerprint(encoding)

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Return the token ids of `text`, if asked with the begin and end tokens that exist."""
        ids = [self.bos_id] if bos and self.bos_id is not None else []
        for piece in _cut_long_space(text):
            ids.extend(self._encoding.encode_ordinary(piece))
        if eos:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; invalid UTF-8 and unassigned ids become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of a token, maybe part of a character; U+FFFD's if it is unassigned."""
        try:
            return self._encoding.decode_single_token_bytes(token)
        except (KeyError, OverflowError):
            return "\N{REPLACEMENT CHARACTER}".encode()


def load_tokenizer(name: str = "", path: str = "", pattern: str = "") -> Tokenizer:
    """Return the tokenizer that the settings of section `[tokenizer]` name.

    Args:
        name: `bytes` (one token a byte) or one of tiktoken's encodings, such as `o200k_base`.
        path: a rank file, path or fsspec URL. Exactly one of `name` and `path` is given.
        pattern: for a rank file: a name of the table above (empty: `default`) or a regex.

    Raises:
        ConfigError: settings that contradict each other or name nothing.
        DataError: a rank file that is missing, damaged or impossible to download.
    """
    if bool(name) == bool(path):
        allowed = "either tokenizer.name or tokenizer.path, not both and not neither"
        raise ConfigError("tokenizer.name", name, allowed)
    if name:
        if pattern:
            raise ConfigError("tokenizer.pattern", pattern, "only together with tokenizer.path")
        return Tokenizer(_named_encoding(name))

    ranks = _parse_ranks(storage.read_bytes(path), path)
    if not pattern and len(ranks) == LLAMA3_NUM_RANKS:
        raise ConfigError(
            "tokenizer.pattern",
            pattern,
            f"{path} has {LLAMA3_NUM_RANKS} ranks like Llama 3's file: say llama3, or default "
            "if it is another one",
        )
    short_name = path.rstrip("/").rsplit("/", 1)[-1]
    return Tokenizer(_encoding(short_name, ranks, pattern or "default"))


def train_rank_file(texts: Iterable[str], vocab_size: int, path: str) -> Tokenizer:
    """Train byte-pair merges on `texts` and write them to `path` as a tiktoken rank file.

    Args:
        vocab_size: counts everything: 256 bytes, the merges and three special tokens.

    Returns:
        The tokenizer of that file. The same texts give the same bytes of the file.

    Raises:
        ConfigError: the vocabulary has no room for a merge.
        DataError: the texts have too few different pairs for it.
    """
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as HubTokenizer

    smallest = 256 + len(BEGIN_END_PAD)
    if vocab_size <= smallest:
        raise ConfigError("vocab_size", vocab_size, f"more than {smallest} (bytes and specials)")
    trained = HubTokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trained.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(BEGIN_END_PAD),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)

    token_bytes = _bytes_of_printable()
    by_id = sorted(trained.get_vocab().items(), key=lambda entry: entry[1])
    merges = [bytes(token_bytes[char] for char in token) for token, _ in by_id]
    tokens = [bytes([value]) for value in range(256)] + [t for t in merges if len(t) > 1]
    if len(tokens) + len(BEGIN_END_PAD) < vocab_size:
        raise DataError(
            f"the text gives a vocabulary of {len(tokens) + len(BEGIN_END_PAD)} tokens at most, "
            f"{vocab_size} were asked for: ask for fewer or give more text"
        )
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    storage.write_bytes(path, b"".join(lines))
    return load_tokenizer(path=path, pattern="default")


def _named_encoding(name: str) -> tiktoken.Encoding:
    if name == "bytes":
        ranks = {bytes([value]): value for value in range(256)}
        return _encoding("bytes", ranks, BYTES_SPLIT)
    names = tiktoken.list_encoding_names()
    if name not in names:
        raise ConfigError("tokenizer.name", name, ", ".join(["bytes", *names]))
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # whatever the network stack raises
        raise DataError(
            f"tokenizer.name = {name!r}: its rank file could not be downloaded "
            f"({type(error).__name__}). Copy the file to this machine and set tokenizer.path and "
            "tokenizer.pattern, or set TIKTOKEN_CACHE_DIR to a folder in which tiktoken has it"
        ) from error


def _encoding(name: str, ranks: dict[bytes, int], pattern: str) -> tiktoken.Encoding:
    """Make the encoding of `ranks` under a pattern, and check that it keeps every character."""
    chosen = PATTERNS.get(pattern) or Pattern(pattern)
    allowed = f"{', '.join(PATTERNS)}, or a regular expression that matches any text piece by piece"
    try:
        if regex.search(chosen.split, "") is not None:
            raise ConfigError("tokenizer.pattern", pattern, f"{allowed}; this matches empty text")
        encoding = tiktoken.Encoding(
            name,
            pat_str=chosen.split,
            mergeable_ranks=ranks,
            special_tokens={t: len(ranks) + i for i, t in enumerate(chosen.special) if t},
        )
    except (ValueError, regex.error) as error:
        raise ConfigError("tokenizer.pattern", pattern, f"{allowed}; {error}") from error
    probe = "Aa éß 12345 it's_[x]\t\r\n\n  \N{GRINNING FACE} \u4e2d\u6587 !?"
    if encoding.decode(encoding.encode_ordinary(probe)) != probe:
        raise ConfigError("tokenizer.pattern", pattern, f"{allowed}; this skips some characters")
    return encoding


def _parse_ranks(content: bytes, path: str) -> dict[bytes, int]:
    """Parse a tiktoken file: ranks 0 to n-1, with every single byte among the tokens."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise DataError(
                f"{path}:{number}: is not `base64 rank`: {line[:40]!r}; the file is damaged or no "
                "tiktoken rank file"
            ) from error
    if sorted(ranks.values()) != list(range(len(ranks))) or not ranks:
        raise DataError(
            f"{path}: its {len(ranks)} tokens do not have the ranks 0 to {len(ranks) - 1}, each "
            "once; the file is damaged: copy it again"
        )
    num_missing = sum(bytes([value]) not in ranks for value in range(256))
    if num_missing:
        raise DataError(
            f"{path}: has no rank for {num_missing} of the 256 single bytes; the file is cut off "
            "or no tiktoken rank file"
        )
    return ranks


def _fingerprint(encoding: tiktoken.Encoding) -> str:
    """Return 16 hex digits that change with any rank, special token or the pattern."""
    ranks = sorted(encoding._mergeable_ranks.items(), key=lambda entry: entry[1])
    parts = [
        encoding._pat_str,
        *(f"{rank}:{token.hex()}" for token, rank in ranks),
        *(f"{token_id}={name}" for name, token_id in sorted(encoding._special_tokens.items())),
    ]
    return storage.sha256_hex("\n".join(parts).encode(), digits=16)


def _cut_long_space(text: str) -> list[str]:
    ends = [match.end() for match in LONG_SPACE.finditer(text)]
    return [text[a:b] for a, b in itertools.pairwise([0, *ends, len(text)])]


def _bytes_of_printable() -> dict[str, int]:
    """Return the bytes behind GPT-2's printable stand-ins, in which `tokenizers` spells tokens."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
