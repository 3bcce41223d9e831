"""Metadata: cut into entries in pieces of any size, parsed entry by entry, refused in one line."""

import json
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dct_qwen2vl.preparation import metadata
from dct_qwen2vl.preparation.entries import UnusableSample
from dct_qwen2vl.preparation.metadata import MetadataReader, PreparationError, find_metadata, parse_entries

VALUES = [{"id": "ä", "n": [1, {"x": None}]}, 12345, -1.5e3, '世界\\n\\u00e9 \\" [{,', True, [], {}, "x" * 300, "\\"]


def read(*paths: Path, limit: int | None = None) -> list:
    return [value for ranges in MetadataReader(list(paths), limit) for _, value in parse_entries(ranges)]


def texts(path: Path) -> list[bytes]:
    data = path.read_bytes()
    ranges = list(MetadataReader([path]))
    bounds = [pair for piece in ranges for pair in zip(piece.start.tolist(), piece.stop.tolist())]
    return [data[start:stop].strip() for start, stop in bounds]


@pytest.mark.parametrize("piece", [1, 2, 7, 64, 1 << 20])
@pytest.mark.parametrize("joint", [",", " ,\r\n\t", "\n, "])
def test_a_list_is_cut_where_its_entries_end(tmp_path, monkeypatch, piece, joint):
    monkeypatch.setattr(metadata, "READ_BYTES", max(piece, 4))  # the byte order mark must fit into the first piece
    written = [json.dumps(value, ensure_ascii=False).encode() for value in VALUES]
    path = tmp_path / "list.json"
    path.write_bytes(b"\xef\xbb\xbf[ " + joint.encode().join(written) + b"\n]\n")
    assert texts(path) == written
    assert read(path) == VALUES


@pytest.mark.parametrize("piece", [4, 7, 64, 1 << 20])
@pytest.mark.parametrize("end", ["", "\n", "\r\n \n"])
def test_lines_are_cut_where_they_end(tmp_path, monkeypatch, piece, end):
    monkeypatch.setattr(metadata, "READ_BYTES", piece)
    values = [{"id": number, "text": "ü\n" * number} for number in range(8)]
    lines = [json.dumps(value, ensure_ascii=False) for value in values]
    path = tmp_path / "lines.jsonl"
    path.write_bytes(("\ufeff" + "\n\n \r\n".join(lines) + end).encode())
    assert texts(path) == [line.encode() for line in lines]
    assert read(path) == values


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(['"', "\\", '\\"', "[", "},", "\\\\"]),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(JSON_VALUES), st.integers(4, 40), st.booleans(), st.sampled_from([None, 0, 2]))
def test_any_list_in_pieces_of_any_size(tmp_path, monkeypatch, values, piece, ascii_only, indent):
    monkeypatch.setattr(metadata, "READ_BYTES", piece)
    path = tmp_path / "list.json"
    text = json.dumps(values, ensure_ascii=ascii_only, indent=indent)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    if all(char < "\ud800" or char > "\udfff" for char in text):
        assert read(path) == values


def test_entries_of_several_files_are_numbered_through(tmp_path):
    (tmp_path / "a.json").write_text('[{"id": 1}, {"id": 2}]')
    (tmp_path / "b.jsonl").write_text('{"id": 3}\n{"id": 4}\n')
    (tmp_path / "c.json").write_text("[]")
    reader = MetadataReader([tmp_path / "a.json", tmp_path / "b.jsonl", tmp_path / "c.json"])
    pieces = list(reader)
    assert [(piece.file, piece.first, len(piece.start), piece.is_list) for piece in pieces] == [
        (0, 0, 2, True),
        (1, 2, 2, False),
    ]
    assert reader.count == 4
    assert reader.digests == [sha256(path.read_bytes()).hexdigest() for path in reader.paths]


@pytest.mark.parametrize("limit", [1, 2, 3, 99])
def test_a_limit_ends_the_reading(tmp_path, limit):
    (tmp_path / "a.json").write_text('[{"id": 1}, {"id": 2}]')
    (tmp_path / "b.jsonl").write_text('{"id": 3}\n{"id": 4}\n')
    values = read(tmp_path / "a.json", tmp_path / "b.jsonl", limit=limit)
    assert values == [{"id": number} for number in range(1, 5)][:limit]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "neither a JSON list nor JSON lines: it is empty"),
        (b"  \n", "neither a JSON list nor JSON lines"),
        (b'"text"', "neither a JSON list nor JSON lines"),
        ('[{"id": 1}]'.encode("utf-16"), "UTF-16"),
        (b'{\n"id": 1\n}\n', "is not JSON lines.*; if it is one object, write the list in it to a file of its own"),
        (b'[{"id": 1}, {"id": ]', "not closed"),
        (b'[{"id": 1}', "not closed: it ends at byte 10"),
        (b'[{"id": 1},]', "Expecting value"),
        (b'[{"id": 1},, {}]', "Expecting value.* in entry 1"),
        (b'[{"id": 1} {"id": 2}]', "Extra data.* in entry 0"),
        (b"[{'id': 1}, {}]", "entry 0, which begins at byte 1"),
        (b'[{"id": "abc]', "not closed"),
        (b"[1, 2] 3", "something follows it at or after byte 6"),
        (b"[1, 2] ]", "something follows"),
        (b"[1, 2}", "closed by '}' at byte 5"),
    ],
)
def test_what_is_no_metadata(tmp_path, text, message):
    path = tmp_path / "cambrian737k.json"
    path.write_bytes(text)
    with pytest.raises(PreparationError, match=message):
        read(path)


def test_text_behind_the_list_in_a_later_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(metadata, "READ_BYTES", 8)
    (tmp_path / "list.json").write_text("[1, 2]" + " " * 50)
    assert read(tmp_path / "list.json") == [1, 2]
    (tmp_path / "list.json").write_text("[1, 2]" + " " * 50 + "x")
    with pytest.raises(PreparationError, match="something follows"):
        read(tmp_path / "list.json")


@pytest.mark.parametrize("form", ["[{},{},{}]", "{}\n{}\n{}\n"])
@pytest.mark.parametrize(
    ("bad", "detail"),
    [
        (b'{"id": "\xff\xfe"}', "not UTF-8: invalid start byte at byte 8; write the file as UTF-8"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    ],
)
def test_an_entry_at_fault_alone_is_marked(tmp_path, form, bad, detail):
    path = tmp_path / "list.json"
    path.write_bytes(form.encode().replace(b"{}", b"%s") % (b'{"id": 1}', bad, b'{"id": 3}'))
    first, second, third = read(path)
    assert (first, third) == ({"id": 1}, {"id": 3})
    assert isinstance(second, UnusableSample)
    assert (second.reason, second.detail) == ("malformed_entry", detail)


def test_a_broken_line_is_marked_and_the_next_is_read(tmp_path):
    path = tmp_path / "list.jsonl"
    path.write_text('{"id": 1}\n{"id": \n{"id": 3}\n\0\0\n{"id": 5}\n{"id": "6')
    values = read(path)
    assert values[::2] == [{"id": 1}, {"id": 3}, {"id": 5}]
    assert [str(value).split(":")[1] for value in values[1::2]] == [" not JSON"] * 3


def test_an_entry_of_many_megabytes_is_not_even_read(tmp_path, monkeypatch):
    monkeypatch.setattr(metadata, "MAXIMUM_ENTRY_BYTES", 100)
    path = tmp_path / "list.json"
    path.write_text(json.dumps([{"id": 1}, {"id": "x" * 200}, {"id": 3}]))
    assert "an entry of 211 bytes" in str(read(path)[1])


def test_metadata_that_changes_while_it_is_read(tmp_path):
    path = tmp_path / "list.json"
    path.write_text('[{"id": 1}, {"id": 2}]')
    pieces = list(MetadataReader([path]))
    path.write_text('[{"id": 1}]')
    with pytest.raises(PreparationError, match="changed while it was read"):
        [value for piece in pieces for _, value in parse_entries(piece)]


def test_where_metadata_is_looked_for(tmp_path, monkeypatch):
    (tmp_path / "Cambrian737K.json").write_text("[]")
    (tmp_path / "more.jsonl").write_text("{}")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "third.json").write_text("[]")
    monkeypatch.chdir(tmp_path)
    assert find_metadata(tmp_path) == [tmp_path / "Cambrian737K.json"]
    named = [Path("more.jsonl"), Path("elsewhere/third.json"), tmp_path / "more.jsonl"]
    assert [path.resolve() for path in find_metadata(tmp_path, named)] == [
        (tmp_path / name).resolve() for name in named
    ]
    with pytest.raises(PreparationError, match=r"no metadata file none\.json"):
        find_metadata(tmp_path, [Path("none.json")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(PreparationError, match="--metadata FILE"):
        find_metadata(tmp_path / "empty")
    with pytest.raises(PreparationError, match=r"--metadata third\.json"):
        find_metadata(tmp_path / "elsewhere")
    (tmp_path / "outer" / "data").mkdir(parents=True)
    (tmp_path / "outer" / "data" / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(PreparationError, match=r"but data/train\.parquet, which is not read: write its rows as JSON"):
        find_metadata(tmp_path / "outer")
    (tmp_path / "outer" / "data" / "Cambrian737k.json").write_text("[]")
    with pytest.raises(PreparationError, match=r", but \S+/outer/data does: give that to --data-dir"):
        find_metadata(tmp_path / "outer")
    (tmp_path / "cambrian737k.json").write_text("[]")
    with pytest.raises(PreparationError, match=r"both Cambrian737K\.json and cambrian737k\.json"):
        find_metadata(tmp_path)
    with pytest.raises(PreparationError, match="is not a folder"):
        find_metadata(tmp_path / "nowhere")
