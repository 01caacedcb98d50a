"""A random checkpoint as GGUF, by llama.cpp's own converter: `gguf_convert.py SOURCE_OF_LLAMA_CPP FOLDER OUTFILE`.

Runs in a peer's environment, as a plain script. Two things are added to what the converter does:

- A vocabulary. The checkpoint has no tokenizer and prompts are token ids, but a GGUF file must name its tokens.
- The softmax scale. For mistral4, llama.cpp multiplies 1/sqrt(d) by m^2, m = 1 + 0.1 ln(factor), whatever
  `mscale_all_dim` says, and cos and sin by m / (1 + 0.1 mscale_all_dim ln(factor)). The makers' params.json says
  `apply_scale` false: no m anywhere. FOLDER's config.json therefore has no `mscale_all_dim`, and its attention
  factor of 1/m, which multiplies each of the two, is written here under the name that llama.cpp reads.
"""

import importlib
import json
import runpy
import sys
from pathlib import Path
from typing import Any

ASCII = 128
ATTENTION_FACTOR = "gguf_attention_factor"  # our own key in FOLDER's config.json


def main() -> None:
    """Patch the converter's classes, then run its command line."""
    source, folder, outfile = (Path(argument) for argument in sys.argv[1:])
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    deepseek = importlib.import_module("conversion.deepseek").DeepseekV2Model
    for model in (deepseek, importlib.import_module("conversion.llama").LlamaModel):
        model.set_vocab = set_vocab
    factor = json.loads((folder / "config.json").read_text(encoding="utf-8")).get(ATTENTION_FACTOR)
    if factor is not None:
        add_attention_factor(deepseek, factor)
    sys.argv = ["convert_hf_to_gguf.py", str(folder), "--outfile", str(outfile), "--outtype", "bf16"]
    runpy.run_path(str(source / "convert_hf_to_gguf.py"), run_name="__main__")


def set_vocab(self: Any) -> None:
    """As many tokens as the model has: ASCII as GPT-2 spells it, then names that stand for nothing.

    No bytes above ASCII: llama-server keeps a token to itself until its bytes are whole characters.
    """
    names = [*ascii_names(), *(f"token{i}" for i in range(ASCII, self.hparams["vocab_size"]))]
    self.gguf_writer.add_tokenizer_model("gpt2")
    self.gguf_writer.add_tokenizer_pre("gpt-2")
    self.gguf_writer.add_token_list(names)
    self.gguf_writer.add_token_types([1] * len(names))  # normal tokens
    self.gguf_writer.add_token_merges([f"{names[0]} {names[1]}"])
    self.gguf_writer.add_bos_token_id(1)
    self.gguf_writer.add_eos_token_id(2)
    self.gguf_writer.add_add_bos_token(False)


def ascii_names() -> list[str]:
    """How GPT-2's tokenizer spells ASCII: printable characters as themselves, the others from U+0100 on."""
    spare = iter(range(256, 512))
    return [chr(code) if 33 <= code < 127 else chr(next(spare)) for code in range(ASCII)]


def add_attention_factor(model: Any, factor: float) -> None:
    """Have `model` write `factor` as `rope.scaling.attn_factor` too."""
    before = model.set_gguf_parameters

    def set_gguf_parameters(self: Any) -> None:
        before(self)
        self.gguf_writer.add_rope_scaling_attn_factors(factor)

    model.set_gguf_parameters = set_gguf_parameters


if __name__ == "__main__":
    main()
