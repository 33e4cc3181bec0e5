"""Small corpora as files, and the documents that came out of preparing them."""

import base64
import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import zstandard

from titan_smf.data.token_shards import TokenShards
from titan_smf.data.tokenizer import Tokenizer


def make_texts(count: int = 400) -> list[str]:
    return [f"Document {n}\nsays héllo \u4e2d {'again ' * (n % 17)}{n * n}" for n in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def write_all_kinds(folder: Path, texts: list[str]) -> dict[str, str]:
    """The same documents in every kind of input."""
    lines = "".join(json.dumps({"text": text}) + "\n\n" for text in texts)
    (folder / "t.jsonl").write_text(lines)
    (folder / "t.txt").write_text("\n\n \t\n".join(texts), encoding="utf-8")
    (folder / "crlf.txt").write_bytes("\r\n\r\n".join(texts).encode())
    (folder / "t.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "t.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    table = pyarrow.table({"id": range(len(texts)), "text": texts})
    pyarrow.parquet.write_table(table, folder / "t.parquet", row_group_size=37)
    (folder / "hub").mkdir()
    write_jsonl(folder / "hub" / "train-0.jsonl", texts[:150])
    write_jsonl(folder / "hub" / "train-1.jsonl", texts[150:])
    names = ("t.jsonl", "t.txt", "crlf.txt", "t.jsonl.gz", "t.jsonl.zst", "t.parquet")
    return {name: str(folder / name) for name in names} | {
        "url": f"file://{folder}/t.jsonl",
        "folder": str(folder / "hub"),
        "glob": str(folder / "hub" / "train-*.jsonl"),
        "hub": f"hf:{folder / 'hub'}",
    }


def write_ranks(path: Path, tokens: list[bytes]) -> str:
    """Write a tiktoken rank file."""
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    path.write_bytes(b"".join(lines))
    return str(path)


def documents_of(folder: Path | str, tokenizer: Tokenizer) -> list[str]:
    """The texts of a folder of token shards, which is verified."""
    shards = TokenShards(str(folder), tokenizer.fingerprint)
    shards.verify()
    documents = [shards.document(i).tolist() for i in range(shards.num_documents)]
    assert all(d[0] == tokenizer.bos_id and d[-1] == tokenizer.eos_id for d in documents)
    return [tokenizer.decode(document[1:-1]) for document in documents]
