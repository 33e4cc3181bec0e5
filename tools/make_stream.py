#!/usr/bin/env python
"""Make what a model is to learn: a fact stream, a document stream, or text that states facts.

    tools/make_stream.py facts QUESTIONS --output new.jsonl --part 1/2
    tools/make_stream.py documents TEXT ... --output chunks.jsonl
    tools/make_stream.py text known.jsonl --output pretraining.jsonl

QUESTIONS is a jsonl, csv or parquet file with the fields of NQ-open, TriviaQA, SimpleQA or a fact
stream, a URL of one, hf:NAME?config=C&split=S, or synthetic:world?set=new_facts. TEXT is what
tools/prepare_data.py takes. FACTS is a fact stream; its text is for pretraining.

Statements and rewrites come from simple patterns, which quote the question or reorder sentences;
from a field of the input (--from-field); or from a chat endpoint (--endpoint), after its cost was
shown and agreed to. Its answers are kept: a run that was killed and is started again pays for none
twice. Exit codes: 0 done, 2 a mistake, 130 interrupted.
"""

import sys

from titan_smf.commands.make_stream import parse_arguments, run
from titan_smf.errors import exit_code

if __name__ == "__main__":
    arguments = parse_arguments(str(__doc__))
    sys.exit(exit_code(lambda: run(arguments)))
