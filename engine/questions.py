"""Questions of a client to the server itself, and their answers: its state, its model, its words.

They are messages of the public RPC; `messages` has the others, and gives these too.
"""

from __future__ import annotations

from cierzo.engine.conversation import ChatMessage, Message, Tool
from cierzo.engine.core_stats import CoreStats
from cierzo.engine.prompt_image import VisionInfo


class GetHealth(Message, frozen=True, tag="health"):
    """Is the core alive and taking requests?"""

    stream: int


class GetStats(Message, frozen=True, tag="stats"):
    """Counters and gauges of front end, scheduler and cache."""

    stream: int


class GetModel(Message, frozen=True, tag="model"):
    """The model that is served, and its limits."""

    stream: int


class Tokenize(Message, frozen=True, tag="tokenize", omit_defaults=True):
    """Give the tokens of a prompt, and compute nothing (feature "tokenize"). Exactly one of `text` and `messages`;
    `tools` and `reasoning_effort` as in Generate. Answered by Tokenized.

    Of a text: `special_tokens` false leaves out what is put around a prompt, such as the beginning-of-text token.
    With `control_tokens` a control token that the text spells is that token, as in no prompt.
    """

    stream: int
    text: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[Tool] = []
    reasoning_effort: str | None = None
    special_tokens: bool = True
    control_tokens: bool = False


class Detokenize(Message, frozen=True, tag="detokenize", omit_defaults=True):
    """Give the text of tokens (feature "tokenize"). `control_tokens`: with the spellings of those, which have no
    text. `pieces`: also the bytes of each token. Answered by Detokenized."""

    stream: int
    token_ids: list[int]
    control_tokens: bool = False
    pieces: bool = False


class GetTokenizer(Message, frozen=True, tag="tokenizer"):
    """Describe the tokenizer of the served model, and tell its chat template (feature "tokenize"). Answered by
    TokenizerInfo."""

    stream: int


class Health(Message, frozen=True, tag="health_reply", omit_defaults=True):
    """`state` is loading, ready, stalled, draining or failed.

    Told with the feature "probes": `startup`, the model has been loaded once; `live`, the server need not be
    restarted; `ready`, it takes requests; `notes`, what an operator should know ahead.
    """

    stream: int
    state: str
    uptime_s: float
    startup: bool = False
    live: bool = False
    ready: bool = False
    notes: list[str] = []


class Stats(Message, frozen=True, tag="stats_reply"):
    """Counters since the start of the front end, and the core's last gauges. `device` is the model's: figures of a
    simulated one say so."""

    stream: int
    device: str
    connections: int
    streams: int
    accepted: int
    refused: int
    finished: int
    core_restarts: int
    core: CoreStats


class ModelInfo(Message, frozen=True, tag="model_reply", omit_defaults=True):
    """The model that is served. `eos_token_ids` end a generation unless `ignore_eos`.

    Told with the feature "parts": `reasoning_efforts`, words that `reasoning_effort` may say; `marks_thinking` and
    `marks_calls`, whether parts of these kinds are told apart. `vision`: images that it takes, None: no images.
    """

    stream: int
    name: str
    architecture: str
    dtype: str
    device: str
    vocab_size: int
    max_model_len: int
    block_tokens: int
    num_blocks: int
    eos_token_ids: list[int]
    has_tokenizer: bool
    has_chat_template: bool
    reasoning_efforts: list[str] = []
    marks_thinking: bool = False
    marks_calls: bool = False
    vision: VisionInfo | None = None


class Tokenized(Message, frozen=True, tag="tokenized"):
    """Answer to Tokenize."""

    stream: int
    token_ids: list[int]


class Detokenized(Message, frozen=True, tag="detokenized", omit_defaults=True):
    """Answer to Detokenize. `pieces`, if they were asked for: the bytes of each token, of a control token those of
    its spelling; together they may be other bytes than those of `text`."""

    stream: int
    text: str
    pieces: list[bytes] = []


class TokenizerInfo(Message, frozen=True, tag="tokenizer_reply", omit_defaults=True):
    """The tokenizer of the served model, as far as it has one. `kind`: whose file it reads and what version that
    has. The tokens are told as they are spelled, `chat_template` as its source; "": there is none."""

    stream: int
    kind: str = ""
    bos_token: str = ""
    eos_token: str = ""
    pad_token: str = ""
    chat_template: str = ""
