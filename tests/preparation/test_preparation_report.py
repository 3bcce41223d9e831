"""The report on a prepared set: its figures, its page in a real browser, what it refuses."""

import io
import json
import re
import shutil
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from prepared_set import StoredSample, write_json, write_set

import data_preparation
from dct_qwen2vl.data.reading import MediaError
from dct_qwen2vl.data.text_tokens import TextTokens
from dct_qwen2vl.dct.configuration_dct import DCTConfig
from dct_qwen2vl.dct.image_sizes_dct import PIXEL_BOUNDS
from dct_qwen2vl.dct.skipping_dct import kept_cells
from dct_qwen2vl.dct.transform_dct import DCTTokenizer
from dct_qwen2vl.preparation.entries import read_turns
from dct_qwen2vl.preparation.report import writing
from dct_qwen2vl.preparation.report.figures import DPI, FIGURES, HEIGHT, WIDTH
from dct_qwen2vl.preparation.report.kept import choose_by_source, count_kept, measure_kept
from dct_qwen2vl.preparation.report.samples import (
    choose_samples,
    make_thumbnail,
    read_conversations,
    read_shown_samples,
)
from dct_qwen2vl.preparation.report.statistics import read_statistics
from dct_qwen2vl.preparation.report.tokens import (
    FACTORS,
    PRESET,
    SEQ_LENGTH,
    count_text_tokens,
    load_tokenizer,
    measure_lengths,
    note_on_long_samples,
    target_sizes,
)
from dct_qwen2vl.preparation.report.writing import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
HOSTILE = (
    "<script>document.title = 'owned'</script>",
    '"><img src=x onerror="document.title = \'owned\'"><svg onload="document.title = \'owned\'">',
    "</dd></dl></article></section><style>* { display: none }</style>&amp;&lt;script&gt;",
    "javascript:document.title='owned'",
)
ARABIC = "ما لون القط؟ \u202eright to left\u202d"
NAME = 'it\'s <b>"quoted"</b> & $x_1$'
LONG_NAME = "n" * 150


def image(height: int, width: int, colour: str = "teal") -> Image.Image:
    return Image.new("RGB", (width, height), colour)


@pytest.fixture(scope="module")
def samples(image_file, video_file, natural_frames) -> list[StoredSample]:
    """Images, videos and text of known sizes, and conversations that mean ill."""

    def imaged(height: int, width: int, turns, source: str = "coco", file_format: str = "JPEG") -> StoredSample:
        ending = {"JPEG": "jpg", "PNG": "png"}[file_format]
        data = image_file(image(height, width), file_format)
        return StoredSample(turns, source, {ending: data}, [(height, width, 1, 0)])

    def asked(question: str, answer: str = "yes") -> list[tuple[str, str]]:
        return [("human", f"<image>\n{question}"), ("gpt", answer)]

    video = video_file(natural_frames(12, 112, 168, 1), 4)
    both = {"0.jpg": image_file(image(280, 420), "JPEG"), "1.png": image_file(image(620, 310, "red"), "PNG")}
    return [
        *(imaged(280, 420, asked(text, text)) for text in HOSTILE),
        imaged(480, 640, asked("Colour? 🦜👨‍👩‍👧 \0\x1b[31m", ARABIC), "gqa", "PNG"),
        imaged(640, 480, asked("x" * 5000, "short"), NAME),
        imaged(5, 3000, asked("A strip?"), LONG_NAME),
        StoredSample(asked("<image>Two?"), "gqa", both, [(280, 420, 1, 0), (620, 310, 1, 0)]),
        StoredSample([("human", "<video>\nMoves?"), ("gpt", "left")], "hmdb", {"mp4": video}, [(112, 168, 12, 3.0)]),
        StoredSample([("human", "Two and two?"), ("gpt", "4")] * 10, "text"),
        replace(imaged(64, 64, asked("Broken?")), parts={"jpg": b"no image"}),
    ]


SKIPPED = (
    ("coco", "missing_media", "coco/1.jpg is in no tar and no folder"),
    ("coco", "missing_media", "coco/2.jpg is in no tar and no folder"),
    ("lost", "broken_image", "<b>lost/1.jpg</b> \ud800: " + "y" * 300),
)


@pytest.fixture(scope="module")
def prepared_set(samples, tmp_path_factory) -> Path:
    """Eleven samples in four shards, with their report."""
    shards = {"train": [samples[:4], samples[4:7]], "val": [samples[7:9]], "test": [samples[9:]]}
    folder = write_set(tmp_path_factory.mktemp("prepared"), shards, SKIPPED)
    write_report(folder)
    return folder


# The page in a browser


@dataclass(frozen=True)
class Visit:
    """dom: the document after loading; console: lines that the page wrote there; requests: what left the browser."""

    dom: str
    console: list[str]
    requests: list[str]


class RecordingProxy(socketserver.StreamRequestHandler):
    """Notes the first line of every request and answers that there is nothing."""

    def handle(self) -> None:
        self.server.requests.append(self.rfile.readline().decode("latin-1").strip())
        self.wfile.write(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


# Chromium asks its makers for the time and for news, whatever page it shows.
BROWSERS_OWN = re.compile(r"[A-Z]+ (https?://)?[a-z0-9.-]+\.(google|googleapis)\.com[:/]")


def find_browser() -> str:
    """The first of BROWSERS that is there and starts; Ubuntu's package of this name is an empty shell."""
    for path in filter(None, map(shutil.which, BROWSERS)):
        if subprocess.run([path, "--version"], capture_output=True, timeout=60).returncode == 0:
            return path
    pytest.skip(f"no working {', '.join(BROWSERS)} on the PATH")


@pytest.fixture(scope="module")
def visit(tmp_path_factory) -> Iterator[Callable[[Path], Visit]]:
    """visit(page): open a file in headless Chromium; a proxy notes and refuses its connections."""
    browser = find_browser()
    quiet = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), RecordingProxy) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()

        def open_page(page: Path) -> Visit:
            proxy.requests = []
            command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", *quiet]
            command += [f"--user-data-dir={tmp_path_factory.mktemp('profile')}", "--enable-logging=stderr"]
            command += [f"--proxy-server=127.0.0.1:{proxy.server_address[1]}", "--proxy-bypass-list=<-loopback>"]
            command += ["--window-size=500,844", "--dump-dom", page.as_uri()]
            done = subprocess.run(command, capture_output=True, timeout=120, check=True)
            console = [line for line in done.stderr.decode(errors="replace").splitlines() if ":CONSOLE" in line]
            requests = [request for request in proxy.requests if not BROWSERS_OWN.match(request)]
            return Visit(done.stdout.decode(), console, requests)

        yield open_page
        proxy.shutdown()


# Writes into the document what can only be seen from within it.
PROBE = """<script>
addEventListener("load", () => {
  document.documentElement.style.width = "360px";  // no window is as narrow as a phone
  const texts = (where) => [...document.querySelectorAll(where)].map((e) => e.innerText);
  const images = [...document.images], tables = {};
  for (const t of document.querySelectorAll("table"))
    tables[t.id] = [...t.rows].map((r) => [...r.cells].map((c) => c.innerText));
  const addresses = [...document.querySelectorAll("[src], [srcset], [href], [data], [action]")]
    .flatMap((e) => ["src", "srcset", "href", "data", "action"].map((name) => e.getAttribute(name)))
    .filter((value) => value !== null).map((value) => value.slice(0, 40));
  const seen = { title: document.title, tables, addresses, facts: texts(".facts"), turns: texts(".turns dd"),
    notes: texts(".note"), images: images.length, width: document.body.scrollWidth,
    broken: images.filter((i) => !i.complete || i.naturalWidth === 0).map((i) => i.alt) };
  const probe = document.createElement("textarea");
  probe.id = "probe";
  probe.textContent = JSON.stringify(seen);
  document.body.append(probe);
});
</script></body>"""


class ProbeReader(HTMLParser):
    """Collects the text of the textarea that PROBE adds."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.text = False, ""

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.inside = self.inside or (tag == "textarea" and ("id", "probe") in attributes)

    def handle_data(self, data: str) -> None:
        self.text += data if self.inside else ""


def read_probe(dom: str) -> dict:
    reader = ProbeReader()
    reader.feed(dom)
    return json.loads(reader.text)


@pytest.fixture(scope="module")
def seen(prepared_set, visit, tmp_path_factory) -> dict:
    """What the browser makes of the page. Its policy is loosened so that PROBE runs, and whatever else would."""
    page = (prepared_set / "report.html").read_text(encoding="utf-8")
    loosened = page.replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    assert loosened != page and page.count("</body>") == 1
    copy = tmp_path_factory.mktemp("probed") / "report.html"
    copy.write_text(loosened.replace("</body>", PROBE), encoding="utf-8")
    return read_probe(visit(copy).dom)


def test_page_is_silent_and_loads_nothing(prepared_set, visit):
    visited = visit(prepared_set / "report.html")
    assert "<h1>Prepared set: cambrian737k.json</h1>" in visited.dom
    assert visited.console == []
    assert visited.requests == []


def test_visits_notice_what_is_wrong(visit, tmp_path):
    """A broken image, an error, something from elsewhere and a page too wide for a phone would be seen."""
    page = tmp_path / "bad.html"
    bad = "<img alt=bad src='data:image/png;base64,AAAA'><img alt=away src='http://example.invalid/x.png'>"
    page.write_text(f"<body><p style='width: 2001px'>{bad}<script>console.error('oh')</script>{PROBE}")
    visited = visit(page)
    seen = read_probe(visited.dom)
    assert seen["broken"] == ["bad", "away"] and seen["width"] > 2000
    assert len(visited.console) == 1 and "oh" in visited.console[0]
    assert visited.requests == ["GET http://example.invalid/x.png HTTP/1.1"]


def test_images_are_shown(seen):
    """Nine figures; an image for each of eight samples, two of the ninth, six frames of the video; one is broken."""
    assert seen["broken"] == []
    assert seen["images"] == len(FIGURES) + 7 + 2 + 6
    assert {address for address in seen["addresses"] if address[0] != "#"} == {
        "data:image/png;base64,iVBORw0KGgoAAAANSU"[:40],
        "data:image/jpeg;base64,/9j/4AAQSkZJRgABA"[:40],
    }
    assert "jpg: not a readable image: cannot identify image file" in seen["notes"]


def test_page_fits_a_phone(seen):
    assert seen["width"] <= 360


def test_counts_are_shown(seen):
    tables = seen["tables"]
    assert tables["table-sources"] == [
        ["source", "entries read", "samples written", "entries skipped"],
        ["coco", "7", "5", "2 28.6 %"],
        ["gqa", "2", "2", "0 0 %"],
        ["hmdb", "1", "1", "0 0 %"],
        [NAME, "1", "1", "0 0 %"],
        ["lost", "1", "0", "1 100 %"],
        [LONG_NAME, "1", "1", "0 0 %"],
        ["text", "1", "1", "0 0 %"],
        ["all", "14", "11", "3 21.4 %"],
    ]
    assert tables["table-skips"][1:] == [["missing media", "2 14.3 %"], ["broken image", "1 7.1 %"]]
    assert tables["table-skips-by-source"] == [
        ["source", "missing media", "broken image"],
        ["coco", "2", "0"],
        ["lost", "0", "1"],
    ]
    assert tables["table-repairs"] == [["repair", "samples"], ["missing placeholder", "2"]]
    assert tables["table-tars"][1:] == [["a.tar", "9", "absolute path 2; unexpected end of data"]]
    assert tables["table-splits"][1:] == [["train", "7 63.6 %"], ["val", "2 18.2 %"], ["test", "2 18.2 %"]]
    assert tables["table-sources-by-split"][1:3] == [
        ["coco", "57.14 %", "0.00 %", "50.00 %", "57.14"],
        ["gqa", "14.29 %", "50.00 %", "0.00 %", "50.00"],
    ]


def test_sizes_and_tokens_are_shown(seen):
    tables = seen["tables"]
    assert tables["table-distributions"][1:6] == [
        ["height, px", "5", "11", "280", "638", "640", "301.9"],
        ["width, px", "64", "74", "420", "2,764", "3,000", "614.7"],
        ["images and videos of a sample", "1", "1", "1", "2", "2", "1.1"],
        ["frames of a video", "12", "12", "12", "12", "12", "12.0"],
        ["duration of a video, s", "3.0", "3.0", "3.0", "3.0", "3.0", "3.0"],
    ]
    assert tables["table-tokens"][1] == ["visual, pixels, exact", "0", "0", "150", "392", "392", "185.0"]
    # Longer than 1,024 tokens: the text of 5,014 characters alone.
    assert tables["table-sequence-lengths"][1:3] == [
        ["1,024", "1 9.1 %", "1 9.1 %", "1 9.1 %"],
        ["2,048", "0 0 %", "0 0 %", "0 0 %"],
    ]
    assert seen["facts"][0].endswith("280 x 420 px · 90 characters · visual tokens: pixels, exact 150; x4 40; x16 8")
    assert "112 x 168 px · 12 frames, 3.0 s" in seen["facts"][8]
    assert "280 x 420 px · 620 x 310 px" in seen["facts"][7]


def test_the_share_kept_with_skipping_is_shown_by_source(seen):
    """Images of one colour keep one cell of 40, 20 and 66; the video is a still photograph of two frames a token."""
    table = seen["tables"]["table-kept"]
    assert table[0] == ["source", "images", "videos"]
    rows = {row[0]: row[1:] for row in table[1:]}
    assert rows["coco"] == ["2 % of 4", ""] and rows["gqa"][0].endswith(" of 3") and rows["hmdb"][0] == ""
    assert re.fullmatch(r"\d+ % of 1", rows["hmdb"][1]) and "text" not in rows
    assert any(note.startswith("With --skip-db 38 and x4, measured on up to 6 samples") for note in seen["notes"])


def test_a_few_samples_with_media_of_each_source_are_measured(prepared_set):
    statistics = read_statistics(prepared_set)
    chosen = choose_by_source(statistics, 0)
    assert chosen["coco"] == [0, 1, 2, 3, 10] and "text" not in chosen and len(chosen) == 5
    long = statistics.seconds.copy()
    long[statistics.is_video] = 31
    assert "hmdb" not in choose_by_source(replace(statistics, seconds=long), 0)
    many = replace(statistics, source=np.zeros_like(statistics.source))
    one, other = (choose_by_source(many, seed)[statistics.sources[0]] for seed in (0, 1))
    assert len(one) == 6 and one == sorted(one) and one != other and 9 not in one  # which has no media


def test_shares_are_those_of_training(natural_frames, image_file):
    """Of the file as training reads it; and a medium that cannot be read is not counted."""
    page = np.full((560, 448, 3), 255, np.uint8)
    page[200:300, 100:300] = natural_frames(1, 100, 200)[0]
    kept, cells = count_kept("image", image_file(page, "PNG"), *PIXEL_BOUNDS)
    config = DCTConfig.preset("x4")
    tokens, grid = DCTTokenizer(config).encode(page[None])
    assert (kept, cells) == (int(kept_cells(tokens, grid, config, 38.0).sum()), 80) and kept < 40
    with pytest.raises(MediaError):
        count_kept("image", b"no image", *PIXEL_BOUNDS)


def test_what_cannot_be_measured_is_said(prepared_set, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    assert measure_kept(prepared_set, PIXEL_BOUNDS, 0).fault == "its process ended early"
    shutil.copytree(prepared_set, tmp_path / "set")
    page = write_report(tmp_path / "set").read_text(encoding="utf-8")
    assert "Not measured: " in page and 'id="table-kept"' not in page


def test_hostile_text_is_shown_and_not_run(seen):
    assert seen["title"] == "Prepared set: cambrian737k.json"
    for number, text in enumerate(HOSTILE):
        assert seen["turns"][2 * number : 2 * number + 2] == [f"<image>\n{text}", text]
    assert seen["facts"][5].startswith(f"{NAME} · 640 x 480 px")
    examples = dict(seen["tables"]["table-skip-examples"][1:])
    assert examples["broken image"] == f"13: <b>lost/1.jpg</b> \ufffd: {'y' * 179}… (121 more characters)"


def test_any_script_and_long_text_are_shown(seen):
    assert seen["turns"][8:10] == ["<image>\nColour? 🦜👨‍👩‍👧 \ufffd\ufffd[31m", ARABIC]
    assert seen["turns"][10] == f"<image>\n{'x' * 1992}…\n(3,008 more characters)"
    assert len([turn for turn in seen["turns"] if turn in ("Two and two?", "4")]) == 12  # of 20


# The files


def test_report_of_a_set_that_was_prepared(image_file, video_file, natural_frames, tmp_path, capsys):
    """What data_preparation.py leaves is what is read here."""
    data = tmp_path / "data"
    (data / "coco").mkdir(parents=True)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    entries = [{"id": n, "image": f"coco/{n}.jpg", "conversations": turns} for n in range(40)]
    entries.append({"id": 40, "video": "coco/video.mp4", "conversations": turns})
    entries += [{"id": n, "conversations": [{**turns[0], "value": f"{n}?"}, turns[1]]} for n in range(50, 60)]
    for n in range(39):  # the last one is missing
        (data / f"coco/{n}.jpg").write_bytes(image_file(image(32 + n, 64), "JPEG"))
    (data / "coco/video.mp4").write_bytes(video_file(natural_frames(8, 64, 96), 4))
    (data / "cambrian737k.json").write_text(json.dumps(entries))
    output = tmp_path / "shards"
    assert data_preparation.main(["--data-dir", str(data), "--output-dir", str(output), "--num-workers", "0"]) == 0
    assert f"Report: {output / 'report.html'}" in capsys.readouterr().out
    statistics = read_statistics(output)
    assert len(statistics) == 50 and statistics.sources == ("coco", "text")
    assert sorted(zip(statistics.height.tolist(), statistics.width.tolist())) == sorted(
        [(32 + n, 64) for n in range(39)] + [(64, 96)]
    )
    assert statistics.frames[statistics.is_video].tolist() == [8]
    assert statistics.seconds[statistics.is_video].tolist() == [2.0]
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "<td>missing media</td>" in page and page.count('<article class="sample">') == 30


def report_files(folder: Path) -> list[Path]:
    return [folder / "report.html", *sorted((folder / "report").iterdir())]


def test_figures_say_nothing_but_what_they_show(prepared_set):
    for figure in FIGURES:
        with Image.open(prepared_set / "report" / f"{figure.name}.png") as image:
            assert image.size == (round(WIDTH * DPI), round(HEIGHT * DPI))
            assert set(image.info) <= {"dpi"}
            assert len(image.getcolors(1 << 20)) > 10, figure.name


def test_figures_without_data_are_taken_away(prepared_set, samples, tmp_path):
    """A set of text alone has no sizes, videos, visual tokens; one without skipped entries no reasons."""
    text = [sample for sample in samples if not sample.parts]
    folder = write_set(tmp_path / "text", {"train": [text * 3]})
    shutil.copytree(prepared_set / "report", folder / "report")
    page = write_report(folder).read_text(encoding="utf-8")
    drawn = {path.stem for path in (folder / "report").iterdir()}
    assert drawn == {"sources", "splits", "text_lengths", "sequence_lengths"}
    assert page.count("<img ") == 4 and page.count("<article ") == 3


def test_many_sources_are_summed_up(samples, tmp_path):
    """Arguments are heeded: 46 estimated tokens of text and 150 of the image are more than 50, but not than 200."""
    named = [replace(samples[0], source=f"source {number:03d}") for number in range(120)]
    folder = write_set(tmp_path / "many", {"train": [named]})
    assert writing.main([str(folder), "--num-samples", "0", "--seq-length", "200", "50"]) == 0
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("<td><span><bdi>20 more sources</bdi></span></td>") == 2
    assert "source 099" in page and "source 100" not in page and "<article" not in page
    assert '<tr><td>50</td><td>120 <span class="share">100 %</span></td>' in page
    assert '<tr><td>200</td><td>0 <span class="share">0 %</span></td>' in page


# Numbers


def test_samples_are_a_seeded_choice(prepared_set):
    statistics = read_statistics(prepared_set)
    assert choose_samples(statistics, 30, 0) == list(range(11))
    first, again, other = (choose_samples(statistics, 4, seed) for seed in (0, 0, 1))
    assert first == again != other and len(set(first)) == 4
    shown = list(read_shown_samples(prepared_set, statistics, [1, 7, 10]))
    assert [(sample.key, sample.shard.name) for sample in shown] == [
        ("000000001", "pretrain-000000.tar"),
        ("000000007", "pretrain-000002.tar"),
        ("000000010", "pretrain-000003.tar"),
    ]
    assert [thumbnail.name for thumbnail in shown[1].thumbnails] == ["0.jpg", "1.png"]


def test_thumbnails_are_small_and_of_the_right_shape(image_file, video_file, natural_frames):
    wide = make_thumbnail("jpg", image_file(image(1000, 4000), "JPEG"))
    assert (wide.height, wide.width) == (80, 320) == Image.open(io.BytesIO(wide.images[0])).size[::-1]
    small = make_thumbnail("0.png", image_file(image(20, 10, "red"), "PNG"))
    assert Image.open(io.BytesIO(small.images[0])).getpixel((5, 10)) == pytest.approx((255, 0, 0), abs=3)
    video = make_thumbnail("mp4", video_file(natural_frames(12, 112, 224), 4))
    assert (video.height, video.width, len(video.images)) == (80, 160, 6)
    assert len(set(video.images)) == 6
    assert make_thumbnail("mp4", b"").fault and not make_thumbnail("mp4", b"").images


def test_target_sizes_are_those_of_the_processor():
    from dct_qwen2vl.dct.image_sizes_dct import target_size

    rng = np.random.default_rng(0)
    for factor, low, high in ((28, 3136, 1_003_520), (56, 3136, 1_003_520), (112, 1, 100), (28, 784, 784)):
        height, width = np.exp(rng.uniform(0, 11, (2, 2000))).astype(np.int64)
        width[:1000] = np.maximum(1, height[:1000] * np.exp(rng.uniform(-1, 1, 1000)))
        found = np.stack(target_sizes(height, width, factor, low, np.full(2000, high))).T.tolist()
        for *size, target in zip(height.tolist(), width.tolist(), found):
            try:
                assert list(target_size(*size, factor, low, high)) == target, (size, factor, low, high)
            except ValueError:
                assert target == [0, 0], (size, factor, low, high)


def test_token_counts_are_those_of_training(prepared_set, qwen2vl_directory, samples):
    """Text, chat template, images and videos, by preset: what the task encoder makes of every sample that it takes."""
    from transformers import AutoTokenizer

    from dct_qwen2vl.data.samples import cook
    from dct_qwen2vl.dct.image_processing_dct import DCTImageProcessor
    from task_encoder import BadSample, QwenTaskEncoder

    statistics = read_statistics(prepared_set)
    counted = count_text_tokens(read_conversations(prepared_set, statistics), load_tokenizer(qwen2vl_directory))
    lengths = measure_lengths(statistics, counted, *PIXEL_BOUNDS)
    tokenizer = AutoTokenizer.from_pretrained(qwen2vl_directory)
    for name, preset in (("pixels, exact", "exact"), ("x4", "x4"), ("x16", "x16")):
        assert FACTORS[name] == DCTImageProcessor(preset).dct_config.resize_factor[0]
        encoder = QwenTaskEncoder(tokenizer, DCTImageProcessor(preset), seq_length=1 << 20)
        for number, sample in enumerate(samples[:-1]):  # the last one's image is broken
            crude = {**sample.parts, "json": json.dumps(sample.entry).encode(), "__key__": "a", "__restore_key__": ()}
            cooked = cook({**crude, "__subflavor__": None, "__subflavors__": {}})
            if lengths.refused[number]:
                with pytest.raises(BadSample, match="aspect ratio"):
                    encoder.encode(cooked)
            else:
                assert len(encoder.encode(cooked).input_ids) == lengths.total(name)[number], (number, name)
    assert lengths.refused.tolist() == [number == 6 for number in range(11)]


def test_grounding_tokens_are_counted_as_training_makes_them(qwen2vl_directory):
    from transformers import AutoTokenizer

    text = "<|box_start|>(110,220),(330,440)<|box_end|> and <|im_end|>?"
    turns = read_turns({"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": text}]})
    counted = count_text_tokens(iter([[turns]]), load_tokenizer(qwen2vl_directory))
    encoded = TextTokens(AutoTokenizer.from_pretrained(qwen2vl_directory)).encode
    texts = ["system\nYou are a helpful assistant.", "\n", f"user\n{text}", "\n", "assistant\n", text, "\n"]
    assert counted.tolist() == [sum(len(encoded(text)) for text in texts) + 6]


def test_text_is_estimated_from_characters(prepared_set):
    """A token for four characters, 21 for the chat template, 2 for each medium."""
    lengths = measure_lengths(read_statistics(prepared_set), None, *PIXEL_BOUNDS)
    assert lengths.text[[0, 7, 9]].tolist() == [23 + 21 + 2, 6 + 21 + 4, 33 + 21]


KINDS = {"photo": (4032, 3024, 1, 0), "small": (480, 640, 1, 0), "HD": (720, 1280, 300, 10.0)}
LONG_NOTES = {
    ("small",): "",
    ("small", "photo"): "Note: training with its defaults leaves out 1 of 2 samples: more than 2,048 tokens in x4, "
    "the longest 3,912. Raise SEQ_LENGTH, or make media smaller: MAXPIXELS=1003520 bash qwen_launch.sh",
    ("HD", "small"): "Note: training with its defaults leaves out 1 of 2 samples: more than 2,048 tokens in x4, "
    "the longest 3,014. Raise SEQ_LENGTH, or make media smaller: bash qwen_launch.sh --video-total-pixels "
    "4704000",
    ("text", "small"): "Note: training with its defaults leaves out 1 of 2 samples: more than 2,048 tokens in x4, "
    "the longest 2,521. Raise SEQ_LENGTH",
}


@pytest.mark.parametrize("kinds", LONG_NOTES, ids=" ".join)
def test_who_prepares_samples_too_long_for_the_defaults_is_told(kinds, tmp_path):
    """In x4, as Qwen2-VL-2B-Instruct reads them: a photograph of 72 x 54 tokens, ten seconds of 10 x 13 x 23 tokens."""
    samples = {kind: StoredSample([("gpt", "yes")], "s", {"jpg": b""}, [shape]) for kind, shape in KINDS.items()}
    samples["text"] = StoredSample([("gpt", "y" * 10_000)], "s")
    statistics = read_statistics(write_set(tmp_path, {"train": [[samples[kind] for kind in kinds]]}))
    note = note_on_long_samples(statistics, measure_lengths(statistics, None, *writing.INSTRUCT_BOUNDS))
    assert (note or "") == LONG_NOTES[kinds]


def test_the_defaults_are_those_of_training_and_of_the_real_model(qwen2vl_directory):
    launcher = (Path(data_preparation.__file__).parent / "qwen_launch.sh").read_text()
    assert f"SEQ_LENGTH:-{SEQ_LENGTH}}}" in launcher and f"2b_dct_{PRESET}}}" in launcher
    assert writing.INSTRUCT_BOUNDS == (3136, 12_845_056)
    for words, bounds in (
        ([], (3136, 12_845_056)),
        (["--tokenizer", str(qwen2vl_directory)], (3136, 200_704)),
        (["--tokenizer", str(qwen2vl_directory), "--max-pixels", "2000"], (2000, 2000)),
    ):
        given = writing.parse_arguments(["O", *words])
        assert (given.min_pixels, given.max_pixels) == bounds


# Refusals


def spoil(folder: Path, name: str, change: Callable[[dict], object]) -> None:
    value = json.loads((folder / name).read_text())
    change(value)
    write_json(folder / name, value)


SHARD, SHARD_STATS = "pretrain-000001.tar", "pretrain-000001.stats.json"
FAULTS = {
    "no stats": (lambda folder: (folder / "stats.json").unlink(), "stats.json cannot be read (No such file"),
    "cut stats": (lambda folder: (folder / "stats.json").write_text('{"tool": '), "stats.json is not JSON"),
    "a list": (lambda folder: (folder / "stats.json").write_text("[]"), "stats.json is JSON, but no object"),
    "another tool's": (lambda folder: spoil(folder, "stats.json", lambda s: s.update(tool="x")), "was not written by"),
    "not complete": (lambda folder: spoil(folder, "stats.json", lambda s: s.update(complete=False)), "not complete"),
    "read": (lambda folder: spoil(folder, "stats.json", lambda s: s.update(read=15)), "read is 15, the sum of its sou"),
    "skipped": (
        lambda folder: spoil(folder, "stats.json", lambda s: s["skipped"].update(missing_media=3)),
        "skipped missing_media is 3, the sum of its sources 2",
    ),
    "negative": (lambda folder: spoil(folder, "stats.json", lambda s: s.update(written=-1)), "must be counts"),
    "source": (lambda folder: spoil(folder, "stats.json", lambda s: s["sources"].update(gqa=2)), "sources must hold"),
    "no shard stats": (lambda folder: (folder / SHARD_STATS).unlink(), f"{SHARD_STATS} cannot be read"),
    "short column": (
        lambda folder: spoil(folder, SHARD_STATS, lambda s: s["media"]["height"].pop()),
        f"{SHARD_STATS}: height must be a list of 3 numbers",
    ),
    "no column": (lambda folder: spoil(folder, SHARD_STATS, lambda s: s["samples"].pop("text")), "text must be a list"),
    "text in a column": (
        lambda folder: spoil(folder, SHARD_STATS, lambda s: s["media"].update(width=[1, "2", 3])),
        "width holds something that is no whole number",
    ),
    "fractions": (
        lambda folder: spoil(folder, SHARD_STATS, lambda s: s["media"].update(frames=[1, 1.5, 1])),
        "frames holds something that is no whole number",
    ),
    "not a number": (
        lambda folder: spoil(folder, SHARD_STATS, lambda s: s["media"].update(seconds=[0, float("nan"), 0])),
        "seconds holds something that is no number",
    ),
    "too large": (
        lambda folder: spoil(folder, SHARD_STATS, lambda s: s["media"].update(height=[1, 1 << 40, 1])),
        "height holds something",
    ),
    "split": (lambda folder: spoil(folder, SHARD_STATS, lambda s: s.update(split="all")), "split must be one of train"),
    "source number": (
        lambda folder: spoil(folder, SHARD_STATS, lambda s: s["samples"].update(source=[0, 1, 9])),
        "its sources are not those of stats.json",
    ),
    "other source": (
        lambda folder: spoil(folder, SHARD_STATS, lambda s: s["samples"].update(source=[0, 0, 0])),
        "written of source",
    ),
    "no shard": (lambda folder: (folder / SHARD).unlink(), f"{SHARD} is missing, but its stats are there"),
    "cut shard": (
        lambda folder: (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:700]),
        f"{SHARD} cannot be read as a tar",
    ),
    "empty shard": (lambda folder: (folder / SHARD).write_bytes(bytes(10240)), f"{SHARD} holds fewer samples than"),
    "no list": (lambda folder: (folder / "skipped.jsonl").unlink(), "skipped.jsonl is missing"),
    "short list": (
        lambda folder: (folder / "skipped.jsonl").write_text(""),
        "skipped.jsonl has no entry skipped as broken_image, stats.json has",
    ),
    "no such list": (lambda folder: (folder / "skipped.jsonl").write_text("[]"), "not what data_preparation.py writes"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_missing_and_contradictory_files_are_one_line(prepared_set, tmp_path, one_line_error, fault):
    folder = shutil.copytree(prepared_set, tmp_path / "set")
    (folder / "report.html").unlink()
    change, message = FAULTS[fault]
    change(folder)
    assert writing.main([str(folder)]) == 1
    error = one_line_error()
    assert error.startswith(f"dct_qwen2vl.preparation.report: {folder}") and message in error
    assert not (folder / "report.html").exists()


def test_a_folder_without_tokenizer_is_one_line(prepared_set, tmp_path, one_line_error):
    assert writing.main([str(prepared_set), "--tokenizer", str(tmp_path)]) == 1
    assert f"{tmp_path / 'tokenizer.json'} cannot be read as a tokenizer" in one_line_error()


@pytest.mark.parametrize(
    "arguments",
    [["--seq-length", "0"], ["--num-samples", "-1"], ["--min-pixels", "9", "--max-pixels", "8"], ["--min-pixels", "0"]],
)
def test_wrong_arguments_are_refused(tmp_path, capsys, arguments):
    with pytest.raises(SystemExit, match="2"):
        writing.main([str(tmp_path), *arguments])
    assert arguments[0] in capsys.readouterr().err


def test_the_least_pixels_give_way_to_lower_most_pixels():
    given = writing.parse_arguments(["O", "--max-pixels", "2000"])
    assert (given.min_pixels, given.max_pixels) == (2000, 2000)
    assert writing.parse_arguments(["O"]).min_pixels == 56 * 56


def test_command_gives_the_same_bytes_without_torch(prepared_set, tmp_path):
    """It must be small beside data preparation, and its help quick."""
    folder = shutil.copytree(prepared_set, tmp_path / "set")
    shutil.rmtree(folder / "report")
    code = """
import sys
from dct_qwen2vl.preparation.report import writing
try:
    writing.main(["--help"])
except SystemExit:
    assert not {"numpy", "matplotlib", "torch"} & set(sys.modules)
assert writing.main([sys.argv[1]]) == 0
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert re.search(rf"^Report: {re.escape(str(folder))}/report.html \([\d.]+ MB\)\n\Z", done.stdout, re.MULTILINE)
    files, others = ({path.name: path.read_bytes() for path in report_files(set_)} for set_ in (folder, prepared_set))
    assert files == others and len(files) == 1 + len(FIGURES)
