"""What all tests of data use."""

import pytest

from titan_smf.data.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer("bytes")
