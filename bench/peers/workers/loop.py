"""The process that holds one engine: `loop.py BACKEND`, a request a line on stdin, an answer a line on stdout.

A plain script that runs in the engine's own environment, which has nothing of ours installed. BACKEND is a file
beside this one with a class `Backend(checkpoint, **options)` of two methods, and for transformers a third:

    generate(prompts, new_tokens) -> for each prompt, when each of its tokens was there: seconds since the call
    top_logprobs(sequences, count) -> for each sequence, at each position, the `count` likeliest next tokens as
        [token id, log-probability], best first, given the sequence up to there

Requests are {"op": "load" | "generate" | ..., ...arguments}; answers {"result": ...} or {"error": text}. What
libraries print to stdout goes to stderr.
"""

import importlib
import json
import os
import sys
import traceback
from typing import Any

WARM_UP_PROMPT = list(range(3, 19))


class Loop:
    """Requests for one backend."""

    def __init__(self, backend_name: str) -> None:
        self.backend_name = backend_name
        self.backend: Any = None

    def load(self, checkpoint: str, options: dict[str, Any]) -> float:
        """Load, and give one token: seconds that this token took."""
        self.backend = importlib.import_module(self.backend_name).Backend(checkpoint, **options)
        return float(self.backend.generate([WARM_UP_PROMPT], 1)[0][0])

    def answer(self, line: str) -> dict[str, Any]:
        """The answer to a request."""
        request = json.loads(line)
        op = request.pop("op")
        try:
            return {"result": (self.load if op == "load" else getattr(self.backend, op))(**request)}
        except Exception as error:
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    loop = Loop(sys.argv[1])
    for line in sys.stdin:
        answers.write(json.dumps(loop.answer(line)) + "\n")
        answers.flush()


if __name__ == "__main__":  # vLLM starts its own processes by importing this file again
    main()
