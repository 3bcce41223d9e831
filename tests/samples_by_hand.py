"""Conversation samples made by hand, as the cooker makes them of shards."""

from dct_qwen2vl.data.samples import ConversationSample

SAMPLE_KEYS = {"__key__": "k", "__restore_key__": (), "__subflavor__": None, "__subflavors__": {}}


def answer(question: str, reply: str) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": reply}]
    return {"conversations": turns}


def conversation_sample(entry, *media: tuple[str, object], key: str = "k") -> ConversationSample:
    """media: ("image" | "video", file bytes) in order."""
    return ConversationSample(**{**SAMPLE_KEYS, "__key__": key}, entry=entry, media=list(media))
