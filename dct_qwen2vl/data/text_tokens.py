"""Which special tokens keep their meaning where a text of the data spells them out, and which are plain text there.

Tokens that open or end a turn, a medium or a document are plain text: data must open no turn and no image of its own.
All other tokens that a tokenizer has been given become their ids, as in the chat template: those of Qwen2-VL's
grounding (`<|box_start|>(110,220),(330,440)<|box_end|>`), and those that somebody has added.
"""

import re
from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TURN_TOKENS = ("<|im_start|>", "<|im_end|>")
MEDIUM_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
STAY_TEXT = (*TURN_TOKENS, *MEDIUM_TOKENS, "<|endoftext|>")
SHORT, MOST_MET = 64, 4096  # characters of a text whose ids are kept, and how many of these are
UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # an id of the model that the tokenizer has no token for


def match_tokens(tokens: Iterable[str]) -> re.Pattern[str]:
    """What finds these tokens in a text, the longest first, as tokenizers do; without tokens it finds nothing."""
    ordered = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, ordered))})" if ordered else "((?!))")


def match_meant(added: Iterable[str], stay_text: Iterable[str] = STAY_TEXT) -> re.Pattern[str]:
    """A pattern that splits a text at the added tokens that become their ids.

    added: All tokens that were added to the tokenizer.
    stay_text: Those that are read as plain text.
    """
    return match_tokens({*added} - {"", *stay_text})


class TextTokens:
    """Text of the data -> ids, and ids of an answer -> text.

    tokenizer: Qwen2-VL's, with its special tokens.
    stay_text: those of its tokens that are plain text where a text spells them out.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer
        self._added = tokenizer.get_added_vocab()
        own = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
        self.stay_text = tuple(token for token in dict.fromkeys((*STAY_TEXT, *own)) if token in self._added)
        self._meant = match_meant(self._added, self.stay_text)
        self._silent = {self._added[token] for token in self.stay_text}
        self._met: dict[str, list[int]] = {}  # ids of short texts

    @cached_property
    def _known(self) -> set[int]:
        return {*self.tokenizer.get_vocab().values()}

    def encode(self, text: str) -> list[int]:
        """Ids of a text, which opens no turn and no medium, whatever it spells out."""
        plain, *rest = self._meant.split(text)
        ids = self._encode_plain(plain)
        for token, plain in zip(rest[::2], rest[1::2], strict=True):
            ids += [self._added[token], *self._encode_plain(plain)]
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        """A tokenizer's call takes longer than its work on a short text, and most of these come again and again."""
        if text not in self._met:
            ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] if text else []
            if len(text) > SHORT or len(self._met) >= MOST_MET:
                return ids
            self._met[text] = ids
        return [*self._met[text]]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of an answer, with its grounding tokens and without those that end turns; UNKNOWN for an id without a
        token."""
        texts, known = [], []
        for number in ids:
            if number in self._known:
                known.append(number)
            else:
                texts += [self._decode_known(known), UNKNOWN]
                known = []
        return "".join([*texts, self._decode_known(known)])

    def _decode_known(self, ids: list[int]) -> str:
        return self.tokenizer.decode([number for number in ids if number not in self._silent])
