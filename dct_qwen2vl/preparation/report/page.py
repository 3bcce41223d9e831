"""The page of the report on a prepared set: one HTML file that holds its images and loads and runs nothing.

It is built as a tree, not as text: what a set says can only become text of the page, whatever it is.
"""

import re
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import numpy as np

from dct_qwen2vl.preparation.data_splits import SPLITS
from dct_qwen2vl.preparation.report.figures import DPI, HEIGHT, WIDTH, Figure, figure_path
from dct_qwen2vl.preparation.report.kept import (
    MOST_SECONDS,
    MOST_SOURCES,
    SAMPLES_OF_A_SOURCE,
    KeptShares,
)
from dct_qwen2vl.preparation.report.samples import MOST_MEDIA, ShownSample, Thumbnail
from dct_qwen2vl.preparation.report.statistics import Statistics
from dct_qwen2vl.preparation.report.tokens import CHARACTERS_OF_A_TOKEN, TEMPLATE_TOKENS, Lengths

STYLE = Path(__file__).with_name("page.css")
# The browser keeps the page to its word.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

MOST_ROWS = 100  # sources of a table
MOST_CHARACTERS = 2000  # of a turn
MOST_TURNS = 12  # of a sample
MOST_DETAIL = 200  # characters of a name or a fault
# Control characters but tab and line feed, halves of surrogate pairs, non-characters: no page may hold them.
UNPRINTABLE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


@dataclass(frozen=True)
class Findings:
    """All that the page shows.

    examples: the first skipped entry for each reason.
    samples: a random choice.
    figures: those drawn, in `folder`.
    kept: what skipping keeps of a few samples; None for a set without media.
    """

    statistics: Statistics
    lengths: Lengths
    seq_lengths: list[int]
    pixel_bounds: tuple[int, int]
    examples: dict[str, dict[str, Any]]
    samples: list[ShownSample]
    figures: list[Figure]
    folder: Path
    kept: KeptShares | None


def write_page(findings: Findings) -> bytes:
    """The file's content."""
    stats = findings.statistics.stats
    title = f"Prepared set: {stats['metadata']}"
    sections = [build(findings) for build in SECTIONS]
    links = (node("a", section.find("h2").text, href=f"#{section.get('id')}") for section in sections)
    head = node(
        "head",
        node("meta", charset="utf-8"),
        node("meta", name="viewport", content="width=device-width, initial-scale=1"),
        node("meta", http_equiv="Content-Security-Policy", content=POLICY),
        node("title", title),
        node("style", STYLE.read_text(encoding="utf-8")),
    )
    body = node(
        "body", node("header", node("h1", title), tiles(findings)), node("nav", *links), node("main", *sections)
    )
    page = node("html", head, body, lang="en")
    return b"<!DOCTYPE html>\n" + ElementTree.tostring(page, encoding="unicode", method="html").encode() + b"\n"


# Building blocks


def node(tag: str, *children: Any, **attributes: Any) -> Element:
    """An element.

    children: elements, text, or None for nothing.
    class_, http_equiv: the attributes class and http-equiv.
    """
    names = {name: name.rstrip("_").replace("_", "-") for name in attributes}
    element = Element(tag, {names[name]: clean(str(value)) for name, value in attributes.items()})
    last = None
    for child in children:
        if isinstance(child, Element):
            element.append(child)
            last = child
        elif child is not None and last is None:
            element.text = (element.text or "") + clean(child)
        elif child is not None:
            last.tail = (last.tail or "") + clean(child)
    return element


def clean(text: str) -> str:
    return UNPRINTABLE.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))


def cut(text: str, most: int) -> tuple[str, str]:
    """The beginning of a text, and a note of what is missing, or ""."""
    return (text, "") if len(text) <= most else (f"{text[:most]}…", f"({len(text) - most:,} more characters)")


def foreign(text: str) -> Element:
    """A name from the set within a line. Written from right to left, it does not turn the line around."""
    shown, note = cut(text, MOST_DETAIL)
    return node("span", node("bdi", shown), f" {note}" if note else None)


def words(name: str) -> str:
    return cut(name, MOST_DETAIL)[0].replace("_", " ")


def percent(part: int, whole: int) -> str:
    """With two digits where the share, or what is left, is small: 0.05 % of 700,000 samples are 350."""
    value = 100 * part / whole if whole else 0.0
    return f"{value:.{0 if value in (0, 100) else 1 if 1 <= value <= 99 else 2}f} %"


def counted(part: int, whole: int) -> Element:
    return node("td", f"{part:,} ", node("span", percent(part, whole), class_="share"))


def table(name: str, header: Sequence[str], rows: Iterable[Sequence[Any]], has_sum: bool = False) -> Element:
    """A table of rows.

    rows: of cells. A cell is a "td", or text or an element to put into one.
    has_sum: the last row sums up the others.
    """
    lines = [[c if isinstance(c, Element) and c.tag == "td" else node("td", c) for c in row] for row in rows]
    body = node("tbody", *(node("tr", *line) for line in lines))
    if has_sum:
        body[-1].set("class", "sum")
    kinds = [cell.get("class", "") for cell in lines[0]]
    head = node("thead", node("tr", *(node("th", title, class_=kind) for title, kind in zip(header, kinds))))
    return node("div", node("table", head, body, id=f"table-{name}"), class_="scroll")


def sum_up(rows: list[tuple], rest: str) -> list[tuple]:
    """The first MOST_ROWS rows (name, count, ...), and one with the sums of the others."""
    others = list(zip(*rows[MOST_ROWS:]))
    return rows[:MOST_ROWS] + ([(f"{len(others[0])} {rest}", *map(sum, others[1:]))] if others else [])


def data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{b64encode(data).decode()}"


def image(findings: Findings, name: str) -> Element | None:
    """A figure; None where there was nothing to draw."""
    for figure in findings.figures:
        if figure.name == name:
            data = figure_path(findings.folder, figure).read_bytes()
            size = {"width": round(WIDTH * DPI), "height": round(HEIGHT * DPI)}
            image = node("img", src=data_uri(data, "png"), alt=figure.caption, **size)
            return node("figure", image, node("figcaption", figure.caption))
    return None


def section(name: str, title: str, *children: Any) -> Element:
    return node("section", node("h2", title), *children, id=name)


def beside(*elements: Element | None) -> Element:
    """Elements that stand beside each other where there is room."""
    return node("div", *elements, class_="beside")


def images(findings: Findings, *names: str) -> list[Element | None]:
    return [image(findings, name) for name in names]


# Counts


def tiles(findings: Findings) -> Element:
    statistics = findings.statistics
    videos = len(np.unique(statistics.owner[statistics.is_video]))
    values = {
        "entries read": statistics.stats["read"],
        "entries skipped": sum(statistics.stats["skipped"].values()),
        "samples written": statistics.stats["written"],
        "with images": int((statistics.media > 0).sum()) - videos,
        "with videos": videos,
        "text only": int((statistics.media == 0).sum()),
        "shards": len(statistics.shards),
    }
    cells = (node("div", node("dt", name), node("dd", f"{value:,}")) for name, value in values.items())
    return node("dl", *cells, class_="tiles")


def sources_section(findings: Findings) -> Element:
    statistics = findings.statistics
    of = statistics.stats["sources"]
    counts = [
        (name, of[name]["read"], of[name]["copies"], of[name]["written"], *statistics.left_out_of(name))
        for name in statistics.sources
    ]
    total = ("all", *(sum(row[column] for row in counts) for column in range(1, 6)))
    header = ("source", "entries read", "copies added", "samples written", "entries skipped", "left out by weight")
    shown = [column for column in range(6) if column not in (2, 5) or total[column]]  # weights are rare
    rows = [[source_cell(row, column) for column in shown] for row in [*sum_up(counts, "more sources"), total]]
    cells = table("sources", [header[column] for column in shown], rows, has_sum=True)
    return section("sources", "Sources", beside(image(findings, "sources"), cells))


def source_cell(row: tuple, column: int) -> Element | str:
    """A cell of a row (name, read, copies, written, skipped, thinned)."""
    if column == 0:
        return foreign(row[0])
    return counted(row[4], row[1]) if column == 4 else f"{row[column]:,}"


def skips_section(findings: Findings) -> Element:
    statistics, read = findings.statistics, findings.statistics.stats["read"]
    skipped = {reason: count for reason, count in statistics.stats["skipped"].items() if count}
    if not skipped:
        return section("skips", "Skipped entries", node("p", "None."))
    reasons = sorted(skipped, key=lambda reason: (-skipped[reason], reason))
    counts = [
        (name, *(statistics.skipped_of(name).get(reason, 0) for reason in reasons))
        for name in statistics.sources
        if any(statistics.skipped_of(name).values())
    ]
    by_source = [(foreign(name), *(f"{count:,}" for count in row)) for name, *row in sum_up(counts, "more sources")]
    by_reason = [(words(reason), counted(skipped[reason], read)) for reason in reasons]
    examples = [(words(reason), example_cell(findings.examples[reason])) for reason in reasons]
    return section(
        "skips",
        "Skipped entries",
        beside(image(findings, "skips"), table("skips", ("reason", "entries, of those read"), by_reason)),
        node("h3", "By source"),
        table("skips-by-source", ("source", *map(words, reasons)), by_source),
        node("h3", "The first of each reason"),
        table("skip-examples", ("reason", "entry"), examples),
    )


def example_cell(entry: dict[str, Any]) -> Element:
    return node("td", f"{entry.get('index')}: ", foreign(str(entry.get("detail"))), class_="text")


def treatment_section(findings: Findings) -> Element:
    stats = findings.statistics.stats
    parts = [(words(name), f"{count:,}") for name, count in sorted(stats["parts"].items())]
    repairs = [(words(name), f"{count:,}") for name, count in sorted(stats["repairs"].items())] or [("none", "0")]
    tables = beside(table("parts", ("media", "number"), parts), table("repairs", ("repair", "samples"), repairs))
    return section("treatment", "Media and repairs", tables, tars_table(stats.get("tars", {})))


def tars_table(tars: dict[str, dict[str, Any]]) -> Element | None:
    """The tars of which something could not be used."""
    rows = [
        (foreign(name), f"{tar['members']:,}", node("td", foreign(why), class_="text"))
        for name, tar in tars.items()
        if (
            why := "; ".join(
                [*(f"{words(r)} {n:,}" for r, n in tar["refused"].items()), *filter(None, [tar["damage"]])]
            )
        )
    ]
    return table("tars", ("tar", "files used", "not used"), rows) if rows else None


def splits_section(findings: Findings) -> Element:
    statistics = findings.statistics
    counts = statistics.source_by_split()
    totals = counts.sum(axis=0)
    samples = [(name, counted(int(total), len(statistics))) for name, total in zip(SPLITS, totals)]
    shares = 100 * counts / np.maximum(1, totals)
    rows = [(name, *row) for name, row in zip(statistics.sources, shares.tolist())]
    present = np.flatnonzero(totals)
    cells = [
        (
            foreign(name),
            *(f"{value:.2f} %" for value in row),
            f"{max(spread := [row[i] for i in present]) - min(spread):.2f}",
        )
        for name, *row in sum_up(rows, "more sources")
    ]
    return section(
        "splits",
        "Splits",
        beside(image(findings, "splits"), table("splits", ("split", "samples"), samples)),
        node("h3", "Share of each source in a split"),
        table("sources-by-split", ("source", *SPLITS, "spread, points"), cells),
    )


# Distributions


def quantities(findings: Findings) -> dict[str, np.ndarray]:
    """What the table of distributions has a row for."""
    statistics = findings.statistics
    videos = statistics.is_video
    return {
        "height, px": statistics.height,
        "width, px": statistics.width,
        "images and videos of a sample": statistics.media[statistics.media > 0],
        "frames of a video": statistics.frames[videos],
        "duration of a video, s": statistics.seconds[videos],
        "characters of all turns": statistics.text,
    }


def distribution_row(name: str, values: np.ndarray) -> list[str]:
    points = [*np.percentile(values, (0, 1, 50, 99, 100)), values.mean(dtype=np.float64)]
    digits = 1 if values.dtype.kind == "f" else 0
    return [name, *(f"{value:,.{digits}f}" for value in points[:-1]), f"{points[-1]:,.1f}"]


def distribution_table(name: str, values: dict[str, np.ndarray]) -> Element:
    header = ("", "least", "1 %", "median", "99 %", "most", "mean")
    return table(name, header, [distribution_row(*item) for item in values.items() if item[1].size])


def sizes_section(findings: Findings) -> Element:
    return section(
        "sizes",
        "Sizes and lengths",
        node("p", "As stored in the shards; of each image and video.", class_="note"),
        beside(*images(findings, "sizes", "aspect_ratios", "videos", "text_lengths")),
        distribution_table("distributions", quantities(findings)),
    )


def tokens_section(findings: Findings) -> Element:
    lengths, statistics = findings.lengths, findings.statistics
    imaged = statistics.media > 0
    values = {f"visual, {name}": counts[imaged] for name, counts in lengths.visual.items()}
    values["text, counted" if lengths.is_counted else "text, estimated"] = lengths.text
    longer = [
        (f"{limit:,}", *(counted(int((lengths.total(name) > limit).sum()), len(statistics)) for name in lengths.visual))
        for limit in findings.seq_lengths
    ]
    return section(
        "tokens",
        "Tokens of the language model",
        node("p", token_note(findings), class_="note"),
        beside(*images(findings, "visual_tokens", "sequence_lengths")),
        distribution_table("tokens", values),
        node("h3", "Samples longer than a sequence length"),
        table("sequence-lengths", ("tokens", *lengths.visual), longer),
        *kept_parts(findings.kept),
    )


def kept_parts(kept: KeptShares | None) -> list[Element]:
    """What skipping would keep of the visual tokens, by source."""
    if kept is None:
        return []
    title = node("h3", "Expected share of visual tokens kept with skipping")
    if kept.fault:
        return [title, node("p", "Not measured: ", foreign(kept.fault), class_="note")]
    note = (
        f"With --skip-db {kept.skip_db:g} and x4, measured on up to {SAMPLES_OF_A_SOURCE} samples of each of the "
        f"{MOST_SOURCES} largest sources, videos of up to {MOST_SECONDS} s. So few say roughly what to expect."
    )
    rows = [
        (foreign(name), *(share_kept(*counts[kind]) for kind in ("image", "video")))
        for name, counts in kept.by_source.items()
    ]
    return [title, node("p", note, class_="note"), table("kept", ("source", "images", "videos"), rows)]


def share_kept(kept: int, cells: int, media: int) -> str:
    """Percent of the cells, and of how many images or videos; empty for none."""
    return f"{100 * kept / cells:.0f} % of {media}" if media else ""


def token_note(findings: Findings) -> str:
    low, high = findings.pixel_bounds
    note = (
        f"Visual tokens follow from the sizes, with {low:,} to {high:,} pixels an image or frame and training's usual "
        "choice of frames. These bounds must be the model's, or MINPIXELS and MAXPIXELS of training; with others: "
        "python -m dct_qwen2vl.preparation.report FOLDER --max-pixels N. "
    )
    if findings.lengths.is_counted:
        note += "Text is counted by the tokenizer, with the chat template. "
    else:
        note += (
            f"Text is estimated: a token for {CHARACTERS_OF_A_TOKEN} characters, as in English, and {TEMPLATE_TOKENS} "
            "for the chat template around one question; other scripts and many short turns take more. "
        )
    refused = int(findings.lengths.refused.sum())
    return note + (f"Samples that training refuses for an aspect ratio over 200: {refused:,}." if refused else "")


# Samples


def samples_section(findings: Findings) -> Element:
    total = len(findings.statistics)
    shown = f"{len(findings.samples):,} of {total:,}, chosen at random. Images are reduced in size; long texts are cut."
    cards = (sample_card(findings, sample) for sample in findings.samples)
    return section("samples", "Samples", node("p", shown, class_="note"), *cards)


def sample_card(findings: Findings, sample: ShownSample) -> Element:
    title = node("h3", sample.key, node("span", f" in {sample.shard.name}, {sample.shard.split}", class_="share"))
    header = node("header", title, node("p", *sample_facts(findings, sample.position), class_="facts"))
    media = [element for thumbnail in sample.thumbnails for element in show_thumbnail(thumbnail)]
    if sample.more_media:
        media.append(node("p", f"and {sample.more_media} more", class_="note"))
    if not media:
        media.append(node("p", "no image", class_="note"))
    turns = [element for turn in sample.turns[:MOST_TURNS] for element in show_turn(turn.role, turn.text)]
    if len(sample.turns) > MOST_TURNS:
        turns.append(node("dt", f"and {len(sample.turns) - MOST_TURNS} more turns"))
    content = node("div", *media, class_="media"), node("dl", *turns, class_="turns")
    return node("article", header, *content, class_="sample")


def sample_facts(findings: Findings, i: int) -> list[Element | str]:
    """One line: source, size, video, characters, tokens."""
    statistics, lengths = findings.statistics, findings.lengths
    facts = []
    media = range(len(statistics.height))[statistics.media_of(i)]
    for medium in media[:MOST_MEDIA]:
        facts.append(f"{statistics.height[medium]} x {statistics.width[medium]} px")
        if statistics.is_video[medium]:
            facts.append(f"{statistics.frames[medium]:,} frames, {statistics.seconds[medium]:.1f} s")
    facts.append(f"{statistics.text[i]:,} characters")
    if media:
        facts.append("visual tokens: " + "; ".join(f"{name} {counts[i]:,}" for name, counts in lengths.visual.items()))
    return [foreign(statistics.sources[statistics.source[i]]), "".join(f" · {fact}" for fact in facts)]


def show_thumbnail(thumbnail: Thumbnail) -> list[Element]:
    if thumbnail.fault:
        return [node("p", f"{thumbnail.name}: ", foreign(thumbnail.fault), class_="note")]
    is_video = len(thumbnail.images) > 1
    attributes = {"width": thumbnail.width, "height": thumbnail.height, "class_": "frame" if is_video else "still"}
    return [
        node(
            "img",
            src=data_uri(data, "jpeg"),
            alt=f"{thumbnail.name}, frame {n}" if is_video else thumbnail.name,
            **attributes,
        )
        for n, data in enumerate(thumbnail.images)
    ]


def show_turn(role: str, text: str) -> tuple[Element, Element]:
    shown, note = cut(text, MOST_CHARACTERS)
    content = node("div", shown, dir="auto"), node("span", note, class_="note") if note else None
    return node("dt", role), node("dd", *content, class_=role)


SECTIONS = (
    sources_section,
    skips_section,
    treatment_section,
    splits_section,
    sizes_section,
    tokens_section,
    samples_section,
)
