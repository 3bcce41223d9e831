"""How much of a text was read wrong."""

import unicodedata

import numpy as np

# What readers may take for one another: they look alike in print.
ALIKE = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "‐": "-", "–": "-", "—": "-", "−": "-", "`": "'"})
RESAMPLES = 2000  # of the bootstrap
INTERVAL = (2.5, 97.5)  # percentiles


def compared(text: str) -> str:
    """The characters of a text that count: `plain` ones but white space."""
    return "".join(plain(text).split())


def plain(text: str) -> str:
    """Compatible forms of a character made one, quotes and dashes made plain."""
    return unicodedata.normalize("NFKC", text).translate(ALIKE)


def edit_distance(read: str, true: str) -> int:
    """Levenshtein (1966): the fewest insertions, deletions and replacements that make one text of the other."""
    before = np.arange(len(true) + 1)
    true_codes = np.array([ord(character) for character in true])
    for number, character in enumerate(read, 1):
        best = np.empty_like(before)
        best[0] = number
        best[1:] = np.minimum(before[:-1] + (true_codes != ord(character)), before[1:] + 1)
        # insertions of what is in `true` alone: each step to the right costs one
        places = np.arange(len(best))
        before = np.minimum.accumulate(best - places) + places
    return int(before[-1])


def error_rate(wrong: np.ndarray, characters: np.ndarray) -> float:
    """Edits for each true character over all pages. wrong, characters: int [pages]."""
    return float(wrong.sum() / characters.sum())


def bootstrap(wrong: np.ndarray, characters: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of `error_rate`, pages drawn with replacement (Efron 1979). wrong, characters: int [pages]."""
    pages = np.random.default_rng(seed).integers(len(wrong), size=(RESAMPLES, len(wrong)))
    low, high = np.percentile(wrong[pages].sum(axis=1) / characters[pages].sum(axis=1), INTERVAL)
    return float(low), float(high)
