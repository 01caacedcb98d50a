"""The process that holds one engine: `loop.py BACKEND OPTIONS`, which answers over the socket that is its stdin.

A plain script that runs in the engine's own environment, which has nothing of ours installed. BACKEND is a file
beside this one with a class `Backend(**OPTIONS)`, JSON with a checkpoint's path at least, of two methods, and for
transformers a third:

    generate(prompts, new_tokens) -> for each prompt, when each of its tokens was there: seconds since the call
    top_logprobs(sequences, count) -> for each sequence, at each position, the `count` likeliest next tokens as
        (token id, log-probability), best first, given the sequence up to there

Requests are (name, arguments), "load" first, which gives one token; answers (result, error).
"""

import importlib
import json
import os
import sys
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

FIRST = {"prompts": [list(range(3, 19))], "new_tokens": 1}


def main() -> None:
    """Answer until the other side hangs up."""
    connection = Connection(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # an engine's own processes must not keep the socket open
    backend: Any = None
    with suppress(EOFError):
        while True:
            name, arguments = connection.recv()
            try:
                if name == "load":
                    backend = importlib.import_module(sys.argv[1]).Backend(**json.loads(sys.argv[2]))
                    name, arguments = "generate", FIRST
                answer = getattr(backend, name)(**arguments), ""
            except Exception as error:
                traceback.print_exc()
                answer = None, f"{type(error).__name__}: {error}"
            connection.send(answer)


if __name__ == "__main__":  # vLLM starts its own processes by importing this file again
    main()
