"""The reader that an answer has, and the names of its calls."""

from __future__ import annotations

from marked import ids, marked_prompts, marked_tokenizer

from cierzo.engine.messages import SamplingParams
from cierzo.engine.text.detok import Detokenizer
from cierzo.engine.text.parts import PartsReader
from cierzo.engine.text.prompt import PromptEncoder, call_id


def test_a_reader_of_parts_where_they_are_wanted_and_marked():
    marked, unmarked = marked_prompts(), PromptEncoder(marked_tokenizer())
    for encoder, apart, kind in (
        (marked, True, PartsReader),
        (marked, False, Detokenizer),
        (unmarked, True, Detokenizer),
    ):
        assert type(encoder.reader(SamplingParams(), apart=apart)) is kind
    reader = marked.reader(SamplingParams(seed=1), apart=True, in_thinking=True, parallel=False)
    assert reader.in_thinking
    reader.push(ids("hm[/THINK][TOOL_CALLS]wind[ARGS]{}[TOOL_CALLS]"))
    assert reader.stop == "[TOOL_CALLS]"
    assert reader.parts[-1].id == call_id(1, 0, 0, 0)


def test_the_ids_of_calls_depend_on_seed_prompt_sample_and_number():
    names = [
        call_id(seed, length, sample, number)
        for seed in (None, 0, 1, 2**63 - 1)
        for length in (1, 12)
        for sample in (0, 1)
        for number in (0, 1, 11)
    ]
    assert len(set(names)) == len(names)
    assert all(len(name) == 9 and name.isalnum() and name.isascii() for name in names)
    assert call_id(1, 12, 0, 0) == call_id(1, 12, 0, 0) == "JL4h5wVNf"


def test_without_a_tokenizer_there_is_none():
    assert PromptEncoder().reader(SamplingParams(), apart=True) is None
