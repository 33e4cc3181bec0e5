"""Small corpora as files, and the documents that came out of preparing them."""

import json
from pathlib import Path

from titan_smf.data.token_shards import TokenShards
from titan_smf.data.tokenizer import Tokenizer


def make_texts(count: int = 400) -> list[str]:
    return [f"Document {n}\nsays héllo \u4e2d {'again ' * (n % 17)}{n * n}" for n in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def documents_of(folder: Path | str, tokenizer: Tokenizer) -> list[str]:
    """The texts of a folder of token shards, which is verified."""
    shards = TokenShards(str(folder), tokenizer.fingerprint)
    shards.verify()
    documents = [shards.document(i).tolist() for i in range(shards.num_documents)]
    assert all(d[0] == tokenizer.bos_id and d[-1] == tokenizer.eos_id for d in documents)
    return [tokenizer.decode(document[1:-1]) for document in documents]
