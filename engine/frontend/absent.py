"""Names that clients of other engines send, and what they ask for: this one has none of it, or under another name,
and says so."""

from __future__ import annotations

_ABILITIES = {
    "adapters (LoRA)": ("lora", "loras", "lora_name", "lora_path", "lora_request", "adapter", "adapter_id"),
    "beam search": ("beam_width", "beam_size", "num_beams", "use_beam_search", "best_of", "length_penalty"),
    "embeddings": (
        *("embed", "embedding", "embeddings", "encoding_format", "dimensions"),
        *("prompt_embeds", "input_embeds", "inputs_embeds"),
    ),
}
_GRAMMARS = (
    *("response_format", "structured_outputs", "json_schema", "guided_decoding", "guided_json", "guided_regex"),
    *("guided_choice", "guided_grammar", "json_object", "regex", "choice", "lark"),
)
_ABILITY_OF = {name: ability for ability, names in _ABILITIES.items() for name in names}


def absent(name: str) -> str:
    """Say which ability a name asks for that no server has, or has not under this name; "" for any other name."""
    if name in _GRAMMARS:
        return f"an answer is held to a schema, pattern or grammar by the field grammar, not by {name}"
    return lacking(name)


def lacking(name: str) -> str:
    """Say which ability a name asks for that no server has; "" for any other name."""
    ability = _ABILITY_OF.get(name)
    return f"this engine has no {ability}: {name}" if ability else ""
