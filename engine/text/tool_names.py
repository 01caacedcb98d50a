"""Names that a tool may have, which are those that OpenAI's and Mistral's servers take."""

import re

TOOL_NAME = "1 to 64 of a-z, A-Z, 0-9, _ and -"
is_tool_name = re.compile(r"[a-zA-Z0-9_-]{1,64}").fullmatch
