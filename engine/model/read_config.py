"""The architecture of a checkpoint's folder, from config.json or params.json. No torch here."""

from __future__ import annotations

from pathlib import Path

import msgspec

from cierzo.engine.checkpoint_file import require_file
from cierzo.engine.checkpoint_format import CONFIG_NAME, PARAMS_NAME, find_format
from cierzo.engine.fields import Fields, naming_unreadable, read_json
from cierzo.engine.model.config import ModelConfig
from cierzo.engine.model.config_json import parse_config
from cierzo.engine.model.params_json import HARMLESS, read_params


def read_model_config(path: Path, text_only: bool = False) -> ModelConfig:
    """Read `path`/config.json, or params.json where that is the layout of the folder (`find_layout`), and the
    end-of-text ids of `path`/generation_config.json where there is one. A quantisation that cannot be loaded, and a
    field of params.json that is unknown, are refused here already. Ids beyond the vocabulary are left out.
    text_only: a vision tower is not read, whatever it is."""
    with naming_unreadable(path):
        layout = find_format(path).layout
        generation = _generation_config(path)
        if layout == "native":
            params = Fields(read_json(path / PARAMS_NAME), file=PARAMS_NAME)
            config = read_params(params, text_only)
            params.refuse_unread(HARMLESS)
        else:
            config = parse_config(Fields(read_json(path / CONFIG_NAME)), generation.has("eos_token_id"), text_only)
    eos = (*config.eos_token_ids, *generation.token_ids("eos_token_id", config.vocab_size))
    return msgspec.structs.replace(config, eos_token_ids=tuple(dict.fromkeys(eos)))


def _generation_config(path: Path) -> Fields:
    """The fields of generation_config.json; none where there is no such file."""
    file = path / "generation_config.json"
    require_file(file)
    return Fields(read_json(file) if file.exists() else {}, file=file.name)
