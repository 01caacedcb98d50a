"""Rows of the fields' tables, endpoint by endpoint."""

from __future__ import annotations

from cierzo.engine.gateway.fields import over, refused, same, served, table

_NO_CUSTOM_TOOLS = "this version calls tools with JSON alone"
_ITS_NAME = "of a schema, whose text alone says what holds"
_ANY_WAY = "the answer holds the schema either way"
_ALLOWED_ARE_ALL = "what is in tools may be called, and nothing else"
_IMAGES_AS_THEY_ARE = "an image has the size that the model takes"
_NO_STORED_IMAGES = "the server stores no files: send a data URL"
_NO_SOUNDS = "the engine neither hears nor speaks"
_NO_FILES = "the server reads no files and no documents"
_NO_STORE = "the server stores no answers and no conversations"
_NO_TOOLS_OF_ITS_OWN = "the server has no tools of its own"
_NO_GUARD = "the server judges no content"
_ONE_TIER = "the server has one tier; priority orders its requests"
_SPECIAL = "special tokens have no text"
_NO_CHOICE_OF_TEMPLATE = "the model's own chat template is used"

SAMPLING = (
    *same("temperature", "top_p", "frequency_penalty", "presence_penalty", "seed", "stop", "n", "logit_bias"),
    served("top_k", "top_k", "-1, as vLLM's clients say it: 0"),
    *same("min_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids"),
    *same("bad_words", "allowed_token_ids", "max_thinking_tokens", "priority", "deadline_s"),
)
MODEL = served("model", note="a name of the served model; left out: that one")
PROMPT_CACHE = table(
    over("mode", "ttl"),
    refused("prewarm", "the cache is filled by requests alone", False),
    refused("comparison_response_id", _NO_STORE),
)
HARMLESS = (
    *over("user", "metadata", "safety_identifier", note="names somebody to a hosted service"),
    *over("prompt_cache_key", "prompt_cache_retention", note="every prompt's blocks are kept as long as they fit"),
    *over("prompt_cache_options", inner=PROMPT_CACHE),
)
HOSTED = (
    refused("moderation", _NO_GUARD),
    refused("service_tier", _ONE_TIER, "auto", "default", "standard_only"),
    refused("store", _NO_STORE, False),
)
STREAM = served("stream", note="true: events as the answer is made; false: all of it at its end")
STREAM_OPTIONS = table(
    served("include_usage", note="a last event with the usage"),
    served("continuous_usage_stats", note="the usage so far in each event"),
    refused("include_obfuscation", "events are not padded", False),
)
STREAMED = (STREAM, served("stream_options", note="with stream true alone", inner=STREAM_OPTIONS))
# Fields that clients of vLLM send beside OpenAI's.
EXTRAS = (
    served("return_tokens_as_token_ids", note="token_id:17 instead of a token's text, in log-probabilities"),
    served("prompt_logprobs", "prompt_logprobs", note="alternatives beside each token of the prompt"),
    refused("return_token_ids", "return_tokens_as_token_ids tells them, with logprobs", False),
    refused("include_stop_str_in_output", "a stop string is no part of the answer", False),
    refused("skip_special_tokens", _SPECIAL, True),
    *over("spaces_between_special_tokens", note=_SPECIAL),
    refused("truncate_prompt_tokens", "a prompt is taken whole or not at all"),
    refused("use_beam_search", "this engine has no beam search", False),
    refused("length_penalty", "this engine has no beam search", 1, 1.0),
    refused("request_id", "the header x-request-id names a request"),
    refused("cache_salt", "the server sees to it that tenants share no blocks"),
    refused("logits_processors", "the server runs no code of its clients"),
    refused("kv_transfer_params", "blocks are not sent from engine to engine", {}),
    refused("mm_processor_kwargs", _IMAGES_AS_THEY_ARE, {}),
    refused("vllm_xargs", "it would be handed to code that is not here", {}),
)

# Forms that an answer holds, and a choice among its tools.
SCHEMA_FORMAT = table(
    served("schema", "", "a JSON schema; structured.md says which"),
    *over("name", "description", note=_ITS_NAME),
    *over("strict", note=_ANY_WAY),
)
FORMAT = table(
    served("type", note="text, json_object, json_schema"),
    served("json_schema", note="with this type", inner=SCHEMA_FORMAT),
)
FORMATS = table(
    *(served("text"), served("json_object"), served("json_schema")),
    refused("structural_tag", "tools and tool_choice say which calls there may be"),
)
STRUCTURED = table(
    served("json", note="a JSON schema, or its text"),
    served("json_object", note="true: any JSON object"),
    served("regex", note="a regular expression that all of the answer matches"),
    served("choice", note="a list of texts, of which the answer is one"),
    served("grammar", note="a grammar in llguidance's dialect of Lark"),
    refused("structural_tag", "tools and tool_choice say which calls there may be"),
    refused("disable_any_whitespace", "the schema alone says what holds", False),
    refused("disable_additional_properties", "the schema alone says what holds", False),
    refused("whitespace_pattern", "the schema alone says what holds"),
)
_IN_ITS_PLACE = "structured_outputs has taken its place"
GUIDED = (
    served(
        "structured_outputs",
        note="one of its fields: what the answer holds, as vLLM's clients say it",
        inner=STRUCTURED,
    ),
    *(refused(name, _IN_ITS_PLACE) for name in ("guided_json", "guided_regex", "guided_choice", "guided_grammar")),
    *(refused(name, _IN_ITS_PLACE) for name in ("guided_decoding_backend", "guided_whitespace_pattern")),
)
RESPONSE_FORMAT = served("response_format", note="what the answer holds", inner=FORMAT)

# --- /v1/chat/completions ------------------------------------------------------------------------------------

FUNCTION = table(
    *(served("name"), served("description"), served("parameters", note="a JSON schema")),
    served("strict", note="true: the arguments hold it"),
)
TOOL = table(served("type", note="function"), served("function", inner=FUNCTION))
TOOLS = table(
    served("function"),
    *(refused(name, _NO_TOOLS_OF_ITS_OWN) for name in ("image_generation", "document_library", "connector")),
    refused("custom", _NO_CUSTOM_TOOLS),
)
CHOSEN = table(served("name", note="of one of tools"))
CHOICE = table(served("type", note="function"), served("function", inner=CHOSEN))
CHOICES = table(served("function"), refused("allowed_tools", _ALLOWED_ARE_ALL), refused("custom", _NO_CUSTOM_TOOLS))
CALLED = table(served("name"), served("arguments", note="JSON, as text or, from Mistral's clients, an object"))
CALL = table(
    *(served("id"), served("type", note="function"), served("function", inner=CALLED)),
    *over("index", note="the place in the list"),
)
CALLS = table(served("function"), refused("custom", _NO_CUSTOM_TOOLS))
MESSAGE = table(
    served("role", note="system, developer (the same), user, assistant, tool"),
    served("content", note="a text, or a list of parts"),
    served("name", note="of a tool's result; of other turns it is refused"),
    served("tool_call_id"),
    served("tool_calls"),
    *(served("reasoning_content", note="a thought before the content"), served("reasoning", note="the same")),
    served("prefix", note="of the last turn, the assistant's: the answer goes on with it"),
    *over("annotations", note="of an answer that comes back"),
    refused("type", "a turn is of no type", "text", "message"),
    refused("refusal", _NO_GUARD),
    refused("audio", _NO_SOUNDS),
    refused("function_call", "tool_calls has taken its place"),
)
CACHE_MARK = over("prompt_cache_breakpoint", note="every block of a prompt can be found again")
TEXT_PART = table(served("type"), served("text"), CACHE_MARK)
THOUGHT_PART = table(
    served("type"),
    served("thinking", note="a text, or a list of text parts"),
    served("closed", note="false, at the end of a turn with prefix: the answer goes on within the thought"),
    over("signature"),
)
PARTS = table(
    *(served("text"), served("thinking")),
    served("image_url", note="of a model that takes images"),
    refused("input_audio", _NO_SOUNDS),
    *(refused(name, _NO_FILES) for name in ("file", "document_url", "resource", "resource_link")),
    refused("reference", "a text that refers to nothing can stand in its place"),
    refused("refusal", _NO_GUARD),
)
IMAGE_PART = table(
    served("type"),
    served(
        "image_url", note="a data URL, or an object with it as url; http and https where the server names the host"
    ),
    CACHE_MARK,
)
PART_ROWS = {"text": TEXT_PART, "thinking": THOUGHT_PART, "image_url": IMAGE_PART}
CHAT = table(
    *(MODEL, SAMPLING, STREAMED, HARMLESS, HOSTED, EXTRAS),
    served("messages", note="the turns of the conversation"),
    served("max_tokens", "max_tokens", "left out: what the context leaves"),
    served("max_completion_tokens", "max_tokens", "the same"),
    served("random_seed", "seed", "Mistral's name of it"),
    served("logprobs", note="true: a log-probability of each token"),
    served("top_logprobs", note="with logprobs: alternatives beside each token"),
    served("prompt_logprobs", note="true, or the number of alternatives beside each token of the prompt"),
    served("top_prompt_logprobs", note="with prompt_logprobs true: their number"),
    served("reasoning_effort", "reasoning_effort", "a word that the model knows"),
    served("tools", note="functions that the model may call, each of a name of its own"),
    served(
        "tool_choice", "tool_choice", "auto, none, required, any (the same), or an object with a function's name"
    ),
    served("parallel_tool_calls", "parallel_tool_calls", "false: at most one call"),
    served("continue_final_message", note="true: as prefix of the last turn"),
    served("add_generation_prompt", note="false: with continue_final_message alone"),
    *over("prediction", note="it could make an answer come sooner, and changes none"),
    *(RESPONSE_FORMAT, *GUIDED),
    refused("audio", _NO_SOUNDS),
    refused("modalities", _NO_SOUNDS, ["text"]),
    refused("functions", "tools has taken its place", []),
    refused("function_call", "tool_choice has taken its place", "auto", "none"),
    refused("verbosity", "the model has no such setting", "medium"),
    refused("web_search_options", _NO_TOOLS_OF_ITS_OWN),
    refused("guardrails", _NO_GUARD, []),
    refused("safe_prompt", "the server adds nothing to a prompt", False),
    refused("prompt_mode", "the server adds nothing to a prompt; reasoning_effort asks for thoughts"),
    refused("echo", "of a chat nothing is repeated", False),
    refused("add_special_tokens", _NO_CHOICE_OF_TEMPLATE, False),
    refused("chat_template", _NO_CHOICE_OF_TEMPLATE),
    refused("chat_template_kwargs", _NO_CHOICE_OF_TEMPLATE, {}),
    refused("documents", _NO_FILES, []),
    refused("include_reasoning", "thoughts are told apart, and not left out", True),
)

# --- /v1/completions, /v1/fim/completions ----------------------------------------------------------------------

COMPLETIONS = table(
    *(MODEL, SAMPLING, STREAMED, EXTRAS, over("user", note="names somebody to a hosted service")),
    served("prompt", note="a text, token ids, or a list of texts or of lists of token ids"),
    served("max_tokens", "max_tokens", "left out: 16; 0 with echo: the prompt alone"),
    served("suffix", "suffix", "what comes behind the answer, where the model can fill in"),
    served("echo", note="true: the prompt before the answer, with logprobs their log-probabilities too"),
    served("logprobs", "logprobs", "alternatives beside each token; 0: the token alone"),
    *(RESPONSE_FORMAT, *GUIDED),
    refused("best_of", "answers are not ranked", 1),
    refused("add_special_tokens", "token ids are taken as they are", True),
)
FIM = table(
    *(MODEL, SAMPLING, STREAMED, over("metadata", "prompt_cache_key"), RESPONSE_FORMAT, GUIDED),
    served("prompt", note="the text before the answer"),
    served("suffix", "suffix", "the text behind it; left out: the prompt is gone on with"),
    served("max_tokens", "max_tokens", "left out: what the context leaves"),
    served("random_seed", "seed", "Mistral's name of it"),
)

# --- /v1/responses -------------------------------------------------------------------------------------------

REASONING = table(
    served("effort", "reasoning_effort", "a word that the model knows"),
    refused("summary", "thoughts are told as they are", "auto"),
    refused("generate_summary", "thoughts are told as they are", "auto"),
    refused("context", "the thoughts that are given are what the model sees", "auto"),
    refused("mode", "the model has no such setting", "standard"),
)
RESPONSE_STREAM = table(
    over("include_usage", note="the last event always has the usage"), STREAM_OPTIONS["include_obfuscation"]
)
RESPONSE_TEXT_FORMAT = table(
    served("type", note="text, json_object, json_schema"),
    served("schema", note="with json_schema: a JSON schema; structured.md says which"),
    *(served(name, note="told again in the answer") for name in ("name", "description")),
    served("strict", note=f"told again in the answer; {_ANY_WAY}"),
)
TEXT_FORMAT = table(
    served("format", note="what the text holds", inner=RESPONSE_TEXT_FORMAT),
    refused("verbosity", "the model has no such setting", "medium"),
)
RESPONSE_TOOL = table(
    *(served("type", note="function"), served("name"), served("description"), served("parameters")),
    served("strict", note="true: the arguments hold the schema"),
    refused("async", "a call is answered before the model goes on", False),
    refused("allowed_callers", "the model alone calls", ["direct"]),
    refused("defer_loading", "every tool is told to the model", False),
    refused("output_schema", "results are taken as they come"),
)
RESPONSE_CHOICE = table(served("type", note="function"), served("name", note="of one of tools"))
RESPONSE_CHOICES = table(
    served("function"),
    refused("allowed_tools", _ALLOWED_ARE_ALL),
    refused("custom", _NO_CUSTOM_TOOLS),
    *(
        refused(name, _NO_TOOLS_OF_ITS_OWN)
        for name in (
            *("file_search", "computer", "computer_use", "computer_use_preview", "web_search_preview"),
            *("web_search_preview_2025_03_11", "mcp", "code_interpreter", "programmatic_tool_calling"),
            *("image_generation", "shell", "apply_patch"),
        )
    ),
)
RESPONSE_TOOLS = table(
    served("function"),
    *(
        refused(name, _NO_TOOLS_OF_ITS_OWN)
        for name in (
            *("file_search", "computer", "computer_use_preview", "web_search", "web_search_2025_08_26"),
            *("mcp", "code_interpreter", "programmatic_tool_calling", "image_generation", "local_shell"),
            *("shell", "namespace", "tool_search", "web_search_preview", "web_search_preview_2025_03_11"),
            "apply_patch",
        )
    ),
    refused("custom", _NO_CUSTOM_TOOLS),
)
_RETURNED = over("id", "status", note="of an answer that comes back")
INPUT_TEXT = table(served("type"), served("text"), CACHE_MARK)
OUTPUT_TEXT = table(
    *(served("type"), served("text")),
    over("annotations", "logprobs", note="of an answer that comes back"),
)
RESPONSE_PARTS = table(
    *(served("input_text"), served("output_text")),
    served("input_image", note="of a model that takes images"),
    refused("input_audio", _NO_SOUNDS),
    refused("input_file", _NO_FILES),
    refused("refusal", _NO_GUARD),
)
INPUT_IMAGE = table(
    served("type"),
    served("image_url", note="a data URL; http and https where the server names the host"),
    over("detail", note=_IMAGES_AS_THEY_ARE),
    refused("file_id", _NO_STORED_IMAGES),
    CACHE_MARK,
)
RESPONSE_PART_ROWS = {"input_text": INPUT_TEXT, "output_text": OUTPUT_TEXT, "input_image": INPUT_IMAGE}
ITEM_MESSAGE = table(served("type"), served("role"), served("content"), _RETURNED, over("phase"))
ITEM_CALL = table(
    *(served("type"), served("call_id"), served("name"), served("arguments")),
    *(_RETURNED, over("caller")),
    refused("namespace", "functions have no namespaces"),
    refused("async", "a call is answered before the model goes on", False),
)
ITEM_RESULT = table(
    *(served("type"), served("call_id"), served("output"), served("name")),
    *(_RETURNED, over("caller")),
    refused("namespace", "functions have no namespaces"),
)
ITEM_REASONING = table(
    *(served("type"), served("content", note="a list of reasoning_text")),
    over("summary", note="the thought itself is what the model sees"),
    _RETURNED,
    refused("encrypted_content", "it can be read where it was made alone"),
)
REASONING_PART = table(served("type"), served("text"))
REASONING_PARTS = table(served("reasoning_text"))
ITEM_ROWS = {
    "message": ITEM_MESSAGE,
    "function_call": ITEM_CALL,
    "function_call_output": ITEM_RESULT,
    "reasoning": ITEM_REASONING,
}
ITEMS = table(
    map(served, ITEM_ROWS),
    *(refused(name, _NO_STORE) for name in ("item_reference", "compaction", "compaction_trigger")),
    refused("configuration_update", "the fields of the body say what holds for all of it"),
    *(
        refused(name, _NO_TOOLS_OF_ITS_OWN)
        for name in (
            *("file_search_call", "computer_call", "computer_call_output", "web_search_call"),
            *("tool_search_call", "tool_search_output", "additional_tools", "image_generation_call"),
            *("code_interpreter_call", "local_shell_call", "local_shell_call_output", "shell_call"),
            *("shell_call_output", "apply_patch_call", "apply_patch_call_output", "mcp_list_tools"),
            *("mcp_approval_request", "mcp_approval_response", "mcp_call", "program", "program_output"),
        )
    ),
    *(refused(name, _NO_CUSTOM_TOOLS) for name in ("custom_tool_call", "custom_tool_call_output")),
)
RESPONSES = table(
    *(MODEL, SAMPLING, STREAM, HARMLESS, HOSTED),
    served("input", note="a text, or a list of items"),
    served("instructions", note="a turn of the system's before the input"),
    served("max_output_tokens", "max_tokens", "left out: what the context leaves"),
    served("tools", note="functions that the model may call, each of a name of its own"),
    served(
        "tool_choice", "tool_choice", "auto, none, required, any (the same), or an object with a function's name"
    ),
    served("parallel_tool_calls", "parallel_tool_calls", "false: at most one call"),
    served("reasoning", inner=REASONING),
    served("text", inner=TEXT_FORMAT),
    *GUIDED,
    refused("response_format", "text.format says it"),
    served("top_logprobs", note="alternatives beside each token"),
    served("include", note="message.output_text.logprobs; others name what no answer here has"),
    served("stream_options", note="with stream true alone", inner=RESPONSE_STREAM),
    *over("max_tool_calls", note="it counts calls of tools that a hosted service runs"),
    refused("n", "a response is one answer", 1),
    refused("background", _NO_STORE, False),
    refused("background_options", _NO_STORE),
    refused("conversation", _NO_STORE),
    refused("previous_response_id", _NO_STORE),
    refused("prompt", _NO_STORE),
    refused("context_management", "a prompt is taken whole or not at all", []),
    refused("truncation", "a prompt is taken whole or not at all", "disabled"),
    refused("access_programs", _NO_GUARD),
    refused("image", "images are parts of input: input_image"),
)

# --- /tokenize, /detokenize ----------------------------------------------------------------------------------

TOKENIZE = table(
    MODEL,
    served("prompt", note="a text; or else messages"),
    served("messages", note="the turns of a conversation, as of /v1/chat/completions"),
    *(served("tools", note="with messages"), served("reasoning_effort", note="with messages")),
    served("continue_final_message", note="true: the last turn is gone on with"),
    served("add_generation_prompt", note="false: with continue_final_message alone"),
    served("add_special_tokens", note="of a prompt. false: without a beginning-of-text token"),
    served(
        "parse_special", note="of a prompt. false: control tokens that it spells are text, as in /v1/completions"
    ),
    served("return_token_strs", note="true: the text of each token too"),
    refused("chat_template", _NO_CHOICE_OF_TEMPLATE),
    refused("chat_template_kwargs", _NO_CHOICE_OF_TEMPLATE, {}),
    *(refused(name, _IMAGES_AS_THEY_ARE, {}) for name in ("mm_processor_kwargs", "media_io_kwargs")),
)
DETOKENIZE = table(MODEL, served("tokens", note="token ids; control tokens are spelled out in the text"))
