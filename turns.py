"""The words of a conversation, as data preparation checks them and training reads them."""

import re
from typing import Any

# Speakers of LLaVA (`from`) and OpenAI (`role`) -> roles of Qwen2-VL's chat template
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
DEFAULT_SYSTEM = "You are a helpful assistant."  # what the chat template inserts when there is no system turn
PLACEHOLDER = re.compile(r"\n?<(image|video)>\n?")  # line breaks around a medium are no text
CONTENT_PARTS = {"image": "<image>", "image_url": "<image>", "video": "<video>"}  # OpenAI's parts of a turn
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON may spell one out, tokenizers take none


def text_of(content: Any) -> str | None:
    """A turn's text; OpenAI's list of parts becomes text with placeholders. None for anything else."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return None
    pieces = [
        part.get("text") if part.get("type") == "text" else CONTENT_PARTS.get(str(part.get("type"))) for part in content
    ]
    return "".join(pieces) if all(isinstance(piece, str) for piece in pieces) else None
