"""Images judged by their structure alone: which files training will read as they are, without decoding one of them.

A JPEG is followed from marker to marker, through its scans, to the EOI that ends the file. Of a PNG, the length and CRC
of every chunk are checked, up to the IEND that ends the file. Checked is what makes Pillow or libjpeg refuse a file.
Anything unusual, sound or not, is left to the decoders.
"""

import struct
import zlib
from functools import lru_cache
from typing import NamedTuple

import numpy as np

JPEG_MAGIC = b"\xff\xd8\xff"
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"

# Markers of JPEG (ITU-T T.81, table B.1)
SOF0, SOF1, SOF2, DHT, EOI, SOS, DQT, DRI, COM = 0xC0, 0xC1, 0xC2, 0xC4, 0xD9, 0xDA, 0xDB, 0xDD, 0xFE
APP0, APP1, APP2, APP13, APP14, APP15 = 0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xEF
RST0, SAME_RST = 0xD0, 0xF8  # the eight restart markers are 0xD0 to 0xD7
SEARCH_BYTES = 1 << 18  # of a scan at a time, for a progressive JPEG has many
# Luma's sampling factors (horizontal, vertical) where both chroma planes have 1, 1.
SAMPLING = frozenset([0x11, 0x21, 0x12, 0x22, 0x41, 0x14, 0x42, 0x24])

IHDR = struct.Struct(">IIBBBBB")  # width, height, bits, colour type, methods: compression, filters, interlacing
PALETTE = 3
CHANNELS = {0: 1, 2: 3, PALETTE: 1}  # by colour type: grey, RGB, palette
# Ancillary chunks of PNG that change no pixel, with the lengths that Pillow takes.
CHUNK_LENGTHS = {
    b"gAMA": (4,),
    b"cHRM": (32,),
    b"sRGB": (1,),
    b"pHYs": (9,),
    b"tIME": (7,),
    b"bKGD": (1, 2, 6),
    b"sBIT": (1, 3),
}
# Keywords of text that Pillow takes for nothing else than text.
TEXT_KEYWORDS = frozenset(
    b"Title,Author,Description,Copyright,Creation Time,Software,Disclaimer,Warning,Source,Comment,"
    b"date:create,date:modify,date:timestamp".split(b",")
)
MAXIMUM_PROFILE = 1 << 20  # bytes of an ICC profile; Pillow refuses more
MAXIMUM_RATIO = 1032  # of what zlib decompresses to what it reads


class Layout(NamedTuple):
    """Of a sound file.

    part: its file ending.
    height, width: as stored, px.
    has_metadata: EXIF or the like. It may turn the image, or may be broken.
    """

    part: str
    height: int
    width: int
    has_metadata: bool = False


def read_layout(data: bytes) -> Layout | None:
    """The layout of a grey or RGB JPEG of 8 bits, or of a PNG of 8 bits without transparency. None for others."""
    try:
        if data.startswith(JPEG_MAGIC):
            return read_jpeg(data)
        if data.startswith(PNG_MAGIC):
            return read_png(data)
    except IndexError:  # it ends where more must follow
        pass
    return None


class JPEGState:
    """What the segments of a JPEG have said so far."""

    def __init__(self) -> None:
        self.layout: Layout | None = None
        self.progressive = False
        self.has_metadata = False
        self.components: dict[int, int] = {}  # id -> number of its quantization table
        self.quantization: set[int] = set()
        self.huffman: set[int] = set()  # class and number: 0x00 to 0x03 DC, 0x10 to 0x13 AC
        self.scanned: set[int] = set()  # ids of components


def read_jpeg(data: bytes) -> Layout | None:
    state, position = JPEGState(), 2
    while data[position] == 0xFF:
        marker = data[position + 1]
        if marker == EOI:
            is_whole = position + 2 == len(data) and state.layout and len(state.scanned) == len(state.components)
            return state.layout._replace(has_metadata=state.has_metadata) if is_whole else None
        end = position + 2 + (data[position + 2] << 8 | data[position + 3])
        if not read_segment(state, marker, data[position + 4 : end], end - position - 4):
            return None
        position = end
        if marker == SOS:
            position = find_end_of_scan(data, end)
    return None


def find_end_of_scan(data: bytes, start: int) -> int:
    """Where the next segment begins. The length of `data` where none does.

    In a scan, 0xFF is followed by 0 or by a restart marker. A regular expression takes twice as long.
    """
    content = np.frombuffer(data, np.uint8)
    for place in range(start, len(data) - 1, SEARCH_BYTES):
        here, following = content[place:-1][:SEARCH_BYTES], content[place + 1 :][:SEARCH_BYTES]
        is_marker = (here == 0xFF) & (following != 0) & (following & SAME_RST != RST0)
        first = int(is_marker.argmax())
        if is_marker[first]:
            return place + first
    return len(data)


def read_segment(state: JPEGState, marker: int, content: bytes, length: int) -> bool:
    """Whether decoders take a segment, given without its marker and length. Notes what it says."""
    if len(content) != length:
        return False
    if marker == DHT:
        tables = read_huffman_tables(content)
        state.huffman.update(tables)
        return bool(tables)
    if marker == DQT:
        return read_quantization(state, content)
    if marker in (SOF0, SOF1, SOF2):
        return read_frame(state, marker, content)
    if marker == SOS:
        return read_scan(state, content)
    if APP0 <= marker <= APP15:
        return read_application(state, marker, content)
    return marker == COM or (marker == DRI and length == 2)


def read_application(state: JPEGState, marker: int, content: bytes) -> bool:
    if marker == APP0:
        return len(content) >= 14 or not content.startswith(b"JFIF")
    if marker == APP2 and content.startswith(b"ICC_PROFILE\0"):
        return len(content) >= 14
    is_metadata = {APP1: content.startswith((b"Exif", b"http://ns.adobe.com/xap/1.0/")), APP2: True, APP13: True}
    state.has_metadata |= is_metadata.get(marker, False)
    return len(content) >= 12 or marker != APP14


@lru_cache(maxsize=1024)
def read_huffman_tables(content: bytes) -> frozenset[int]:
    """The tables of a DHT segment, none if one of them is no Huffman code (T.81, annex C).

    They are kept: most files have the same.
    """
    tables, position = [], 0
    while position < len(content):
        table, counts = content[position], content[position + 1 : position + 17]
        symbols = content[position + 17 : position + 17 + sum(counts)]
        if table & 0xEF > 3 or len(counts) != 16 or len(symbols) != sum(counts) or len(symbols) > 256:
            return frozenset()
        if not is_prefix_code(counts) or (table < 0x10 and max(symbols, default=0) > 15):
            return frozenset()
        tables.append(table)
        position += 17 + len(symbols)
    return frozenset(tables)


def is_prefix_code(counts: bytes) -> bool:
    """Whether codes of these lengths can be told apart. The code of ones alone must stay free.

    counts: how many codes have 1, 2, ... 16 bits.
    """
    code = 0
    for bits, count in enumerate(counts, start=1):
        code += count
        if count and code >= 1 << bits:
            return False
        code <<= 1
    return True


def read_quantization(state: JPEGState, content: bytes) -> bool:
    position = 0
    while position < len(content):
        table = content[position]
        if table & 15 > 3 or table > 31:
            return False
        state.quantization.add(table & 15)
        position += 65 if table < 16 else 129
    return position == len(content)


def read_frame(state: JPEGState, marker: int, content: bytes) -> bool:
    height, width, number = content[1] << 8 | content[2], content[3] << 8 | content[4], content[5]
    if state.layout or content[0] != 8 or not height or not width or len(content) != 6 + 3 * number:
        return False
    factors = [content[place] for place in range(7, len(content), 3)]
    if number == 1:
        is_usual = factors[0] in SAMPLING
    else:
        is_usual = number == 3 and factors[0] in SAMPLING and factors[1] == factors[2] == 0x11
    state.components = {content[place]: content[place + 2] for place in range(6, len(content), 3)}
    state.progressive = marker == SOF2
    state.layout = Layout("jpg", height, width)
    return is_usual and len(state.components) == number


def read_scan(state: JPEGState, content: bytes) -> bool:
    """A scan header whose components and tables are there, and whose progression is possible (T.81, G.1.1.1)."""
    number = content[0]
    if not state.layout or not 1 <= number <= 3 or len(content) != 2 * number + 4:
        return False
    first, last, high, low = content[-3], content[-2], content[-1] >> 4, content[-1] & 15
    named = {content[place]: content[place + 1] for place in range(1, 2 * number, 2)}
    if len(named) != number or any(state.components.get(name) not in state.quantization for name in named):
        return False
    needs_dc, needs_ac = True, True
    if not state.progressive and not state.scanned.isdisjoint(named):
        return False
    if state.progressive:
        is_possible = last == 0 if first == 0 else first <= last <= 63 and number == 1
        if not is_possible or low > 13 or (high and low != high - 1):
            return False
        needs_dc, needs_ac = first == 0 and high == 0, first > 0
    state.scanned.update(named)
    return not any(
        (needs_dc and tables >> 4 not in state.huffman) or (needs_ac and 0x10 | tables & 15 not in state.huffman)
        for tables in named.values()
    )


def read_png(data: bytes) -> Layout | None:
    """Chunks as in the PNG specification, section 11 (W3C, third edition)."""
    chunks = list_chunks(data)
    kinds = [kind for kind, _ in chunks]
    if not chunks or kinds[0] != b"IHDR" or kinds[-1] != b"IEND" or len(chunks[0][1]) != 13 or len(chunks[-1][1]):
        return None
    width, height, bits, colour, *methods = IHDR.unpack(chunks[0][1])
    pixels = [content for kind, content in chunks if kind == b"IDAT"]
    if not pixels or bits != 8 or colour not in CHANNELS or methods not in ([0, 0, 0], [0, 0, 1]):
        return None
    first, last = kinds.index(b"IDAT"), kinds.index(b"IDAT") + len(pixels)
    palettes = [content for kind, content in chunks[:first] if kind == b"PLTE"]
    others = [chunk for chunk in chunks[1:-1] if chunk[0] not in (b"IDAT", b"PLTE")]
    is_sound = (
        kinds[first:last] == [b"IDAT"] * len(pixels)
        and kinds.count(b"PLTE") == len(palettes) <= 1
        and all(0 < len(palette) <= 768 and len(palette) % 3 == 0 for palette in palettes)
        and (colour != PALETTE or palettes)
        and is_zlib(bytes(pixels[0][:2]))
        and 0 < height * (1 + width * CHANNELS[colour]) <= MAXIMUM_RATIO * sum(map(len, pixels))
        and all(is_harmless(kind, bytes(content)) for kind, content in others)
    )
    return Layout("png", height, width) if is_sound and width else None


def list_chunks(data: bytes) -> list[tuple[bytes, memoryview]]:
    """(kind, content) of the chunks of a PNG that fill the file. Empty if a length or a CRC is wrong."""
    view, chunks, position = memoryview(data), [], len(PNG_MAGIC)
    while position < len(data):
        length = int.from_bytes(view[position : position + 4], "big")
        end = position + 12 + length
        if end > len(data) or zlib.crc32(view[position + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            return []
        chunks.append((data[position + 4 : position + 8], view[position + 8 : end - 4]))
        position = end
    return chunks


def is_zlib(header: bytes) -> bool:
    """Two bytes, RFC 1950: deflate, a window of up to 32 KiB, no dictionary."""
    return (
        len(header) == 2
        and header[0] & 15 == 8
        and header[0] >> 4 <= 7
        and not header[1] & 32
        and ((header[0] << 8 | header[1]) % 31 == 0)
    )


def is_harmless(kind: bytes, content: bytes) -> bool:
    """Whether Pillow reads an ancillary chunk without complaint and decodes the same pixels without it."""
    if kind == b"tEXt":
        return content.split(b"\0", 1)[0] in TEXT_KEYWORDS
    if kind == b"iCCP":
        return is_profile(content)
    return len(content) in CHUNK_LENGTHS.get(kind, ())


def is_profile(content: bytes) -> bool:
    """An ICC profile: name, zero, method 0, zlib data of moderate size."""
    _, separator, compressed = content.partition(b"\0")
    if not separator or not compressed.startswith(b"\0"):
        return False
    decompressor = zlib.decompressobj()
    try:
        return len(decompressor.decompress(compressed[1:], MAXIMUM_PROFILE)) < MAXIMUM_PROFILE and decompressor.eof
    except zlib.error:
        return False
