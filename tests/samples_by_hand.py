"""Conversation samples made by hand, as the cooker makes them of shards."""

from task_encoder import ConversationSample


def answer(question: str, reply: str) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": reply}]
    return {"conversations": turns}


def conversation_sample(entry, *media: tuple[str, object], key: str = "k") -> ConversationSample:
    """media: ("image" | "video", file bytes) in order."""
    keys = {"__key__": key, "__restore_key__": (), "__subflavor__": None, "__subflavors__": {}}
    return ConversationSample(**keys, entry=entry, media=list(media))
