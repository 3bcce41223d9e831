"""Which file a name may mean that is the name of none: only readings that leave no doubt.

"a b.jpg "              blanks around it
"coco\\1.jpg"            folders as Windows writes them
"coco/a%20b.jpg"        as in a URL
"coco/train2017/1.jpg"  train2017/1.jpg in coco.tar: the tar stands for the folder into which it is unpacked
"""

import posixpath
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import unquote

MOST_SPELLINGS = 3


def other_spellings(name: str) -> list[str]:
    """Up to MOST_SPELLINGS other ways to write a name, the likeliest first; none leads out of the folder."""
    slashed = name.strip().replace("\\", "/")
    spellings = dict.fromkeys([name.strip(), slashed, unquote(slashed)])
    return [clean for clean in map(cleaned, spellings) if clean and clean != name]


def cleaned(name: str) -> str:
    """ "a/b" for "./a//b"; "" for what leads out of the folder."""
    if not name or "\0" in name or name.startswith("/") or ".." in name.split("/"):
        return ""
    return posixpath.normpath(name)


def within_folders(name: str, others: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(first folder in lower case, the rest) of a name and of its other spellings.

    name: The name.
    others: Its other spellings.
    """
    for spelling in (name, *others):
        folder, _, rest = spelling.partition("/")
        if rest:
            yield folder.lower(), rest


def folder_of(tar: Path) -> str:
    """ "coco" for coco.tar and coco.tar.gz."""
    return tar.name.lower().removesuffix(".gz").removesuffix(".tar").removesuffix(".tgz")


def shorter_names(name: str) -> list[str]:
    """The name without its first folder, without its first two, ... The last one is the file's own."""
    parts = name.replace("\\", "/").strip().split("/")
    return ["/".join(parts[start:]) for start in range(1, len(parts))]
