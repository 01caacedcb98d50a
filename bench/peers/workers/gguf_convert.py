"""A random checkpoint as GGUF, by llama.cpp's own classes: `gguf_convert.py SOURCE FOLDER OUTFILE FORMAT`.

SOURCE is that of llama.cpp. Runs in a peer's environment, as a plain script. Two things are added to its converter:

- A vocabulary. The checkpoint has no tokenizer and prompts are token ids, but a GGUF file must name its tokens.
- The softmax scale. For mistral4, llama.cpp multiplies 1/sqrt(d) by m^2, m = 1 + 0.1 ln(factor), whatever
  `mscale_all_dim` says, and cos and sin by m / (1 + 0.1 mscale_all_dim ln(factor)). The makers' params.json says
  `apply_scale` false: no m anywhere. So `mscale_all_dim` is left out, and an attention factor of 1/m, which
  multiplies each of the two, is written under the name that llama.cpp reads.
"""

import functools
import importlib
import math
import sys
from pathlib import Path
from typing import Any

import torch

ASCII = 128


def main() -> None:
    """Convert with the class for config.json's model type, not for its architecture: mistral4 has none."""
    source, folder, outfile = (Path(argument) for argument in sys.argv[1:4])
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    hparams = importlib.import_module("conversion.base").ModelBase.load_hparams(folder, is_mistral_format=False)
    model: Any = importlib.import_module("conversion.llama").LlamaModel
    factor = None
    if hparams["model_type"] == "mistral4":
        model = importlib.import_module("conversion.mistral3").Mistral3Model.Mistral4Model
        factor = without_magnitude(hparams["rope_parameters"])
    kind = importlib.import_module("gguf").LlamaFileType[f"MOSTLY_{sys.argv[4].upper()}"]
    with torch.inference_mode():
        converter = model(folder, kind, outfile, hparams=hparams)
        converter.set_vocab = functools.partial(add_vocabulary, converter.gguf_writer, hparams["vocab_size"])
        if factor is not None:
            converter.gguf_writer.add_rope_scaling_attn_factors(factor)
        converter.write()


def without_magnitude(rope: dict[str, Any]) -> float:
    """Take the magnitudes out of rope parameters; the factor that cancels llama.cpp's own."""
    for name in [name for name in rope if name.startswith("mscale")]:
        del rope[name]
    return 1 / (1 + 0.1 * math.log(rope["factor"]))


def add_vocabulary(writer: Any, size: int) -> None:
    """As many tokens as the model has: ASCII as GPT-2 spells it, then names that stand for nothing.

    No bytes above ASCII: llama-server keeps a token to itself until its bytes are whole characters.
    """
    spare = iter(range(256, 512))  # printable characters are spelled as themselves, the others from U+0100 on
    names = [chr(code) if 33 <= code < 127 else chr(next(spare)) for code in range(ASCII)]
    names += [f"token{i}" for i in range(ASCII, size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(names)
    writer.add_token_types([1] * len(names))  # normal tokens
    writer.add_token_merges([f"{names[0]} {names[1]}"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)


if __name__ == "__main__":
    main()
