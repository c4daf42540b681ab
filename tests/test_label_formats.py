"""Pairs go out in four formats, and answers come back from any of them, to the character.

The exports here are what label-studio-sdk 2.1 and argilla 2.8 write, with other texts.
"""

import csv
import io
import json
import pathlib
import tempfile
import xml.etree.ElementTree
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activedpo_jax.oracles import formats
from activedpo_jax.oracles.labels import PREFERENCES, Label, Preference, Question

CHAT = [
    {"role": "system", "content": "Be brief.", "tool_calls": []},
    {"role": "user", "content": [{"type": "text", "text": "Hi 👋"}]},
    {"role": "assistant", "content": None, "tool_calls": [{"name": "look_up"}]},
]
CHAT_TEXT = (
    'system: Be brief.\n\nuser: [{"type": "text", "text": "Hi 👋"}]\n\nassistant: \ntool_calls: [{"name": "look_up"}]'
)
TEXTS = [
    "two\nlines\r\nand \"quotes\", 'commas'; semicolons\tand a tab",
    "🤖 שלום مرحبا \u2028 separated \u2029 by \x85 marks\r",
    "<b>bold</b> & <script>alert(1)</script>",
    "",
    " ",
    '"',
]
IDS = ["00123", "1e5", "1/2-3", "=1+1", "'quoted'", "dec-1", " spaced ", 'a,b;c\n"d"', "é\u2028", "a\r\nb\rc"]
QUESTIONS = [
    Question(
        pair_id=pair_id,
        prompt=CHAT if i == 0 else TEXTS[i % len(TEXTS)],
        first=TEXTS[(i + 1) % len(TEXTS)],
        second=TEXTS[(i + 2) % len(TEXTS)],
        score=0.123456,
        round=3,
    )
    for i, pair_id in enumerate(IDS)
]
ANSWERS: list[Preference] = [PREFERENCES[i % len(PREFERENCES)] for i in range(len(IDS))]


def labels(source: str, **fields: Any) -> list[Label]:
    return [Label(name, answer, source, **fields) for name, answer in zip(IDS, ANSWERS, strict=True)]


def file(folder: pathlib.Path, name: str, content: Any) -> pathlib.Path:
    """A file of bytes or text, else of `content` as JSON."""
    path = folder / name
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content)).encode()
    path.write_bytes(content)
    return path


def read_table(path: pathlib.Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8-sig", newline="") as table:
        return list(csv.DictReader(table))


def table_text(rows: list[dict[str, str]], delimiter: str = ",") -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def fill_table(path: pathlib.Path, answers: list[Preference], delimiter: str = ",") -> None:
    rows = [{**row, "preference": answer} for row, answer in zip(read_table(path), answers, strict=True)]
    path.write_bytes(table_text(rows, delimiter).encode())


def fill_lines(path: pathlib.Path, answers: list[Preference]) -> None:
    rows = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    rows = [{**row, "preference": answer} for row, answer in zip(rows, answers, strict=True)]
    path.write_bytes(b"\n".join(json.dumps(row).encode() for row in rows))  # no newline after the last


def fill_label_studio(path: pathlib.Path, answers: list[Preference]) -> None:
    tasks = json.loads(path.read_bytes())
    for task, answer in zip(tasks, answers, strict=True):
        task["annotations"] = [annotation([choice(answer)])]
    path.write_bytes(json.dumps(tasks).encode())


def fill_argilla(path: pathlib.Path, answers: list[Preference]) -> None:
    records = json.loads(path.read_bytes())
    for record, answer in zip(records, answers, strict=True):
        record |= {"status": "completed", "responses": {"preference": [{"value": answer, "user_id": "u1"}]}}
    path.write_bytes(json.dumps(records).encode())


def choice(value: str, name: str = "preference") -> dict[str, Any]:
    return {
        "id": "Dx_aB91ISN",
        "from_name": name,
        "to_name": "prompt",
        "type": "choices",
        "origin": "manual",
        "value": {"choices": [value]},
    }


def annotation(results: list[Any], author: Any = 7, cancelled: bool = False) -> dict[str, Any]:
    return {
        "id": 1001,
        "completed_by": author,
        "result": results,
        "was_cancelled": cancelled,
        "ground_truth": False,
        "created_at": "2026-03-09T22:16:08.728353Z",
        "updated_at": "2026-03-09T22:17:00.000000Z",
        "draft_created_at": None,
        "lead_time": 4.288,
        "task": 1,
    }


TIME = "2026-03-09T22:17:00+00:00"


def task(*annotations: Any, pair_id: str = "p1") -> dict[str, Any]:
    return {
        "id": 11,
        "annotations": list(annotations),
        "drafts": [{"id": 3, "result": [choice("second")]}],
        "predictions": [{"model_version": "m", "result": [choice("second")]}],
        "data": {"pair_id": pair_id, "round": 1, "prompt": "a", "first": "b", "second": "c"},
        "meta": {},
        "project": 83,
    }


def record(responses: Any, status: str = "completed", pair_id: str = "p1") -> dict[str, Any]:
    return {
        "id": pair_id,
        "fields": {"prompt": "a", "first": "b", "second": "c"},
        "metadata": {"round": 1},
        "suggestions": {"preference": {"value": "second", "score": 0.9, "agent": "m"}},
        "responses": responses,
        "vectors": {},
        "status": status,
        "_server_id": "0ad5bd70-0001-4e0c-8f6e-5a3a7a1d2c11",
    }


def flat_record(pair_id: str, responses: Any, users: Any, statuses: Any) -> dict[str, Any]:
    return {
        "id": pair_id,
        "status": "completed",
        "_server_id": None,
        "prompt": "a",
        "preference.responses": responses,
        "preference.responses.users": users,
        "preference.responses.status": statuses,
    }


# What is written


def test_answers_filled_in_come_back_from_every_format(tmp_path: pathlib.Path) -> None:
    formats.write(tmp_path, QUESTIONS)
    assert {path.name for path in tmp_path.iterdir()} == {"pairs.csv", "pairs.jsonl", *formats.TASKS}
    fill_lines(tmp_path / "pairs.jsonl", ANSWERS)
    fill_table(tmp_path / "pairs.csv", ANSWERS)
    fill_label_studio(tmp_path / "label_studio.json", ANSWERS)
    fill_argilla(tmp_path / "argilla.json", ANSWERS)
    assert formats.read(tmp_path / "pairs.jsonl") == labels("pairs.jsonl")
    assert formats.read(tmp_path / "pairs.csv") == labels("pairs.csv")
    found = formats.read(tmp_path / "label_studio.json")
    assert found == labels("label_studio.json", annotator="7", time=TIME)
    assert formats.read(tmp_path / "argilla.json") == labels("argilla.json", annotator="u1")


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.csv", "label_studio.json", "argilla.json"])
def test_what_nobody_has_filled_in_has_no_answers(tmp_path: pathlib.Path, name: str) -> None:
    formats.write(tmp_path, QUESTIONS)
    assert formats.read(tmp_path / name) == []


def test_texts_are_exact_and_scores_are_not_shown(tmp_path: pathlib.Path) -> None:
    formats.write(tmp_path, QUESTIONS)
    lines = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    table = read_table(tmp_path / "pairs.csv")
    tasks = [task["data"] for task in json.loads((tmp_path / "label_studio.json").read_bytes())]
    records = json.loads((tmp_path / "argilla.json").read_bytes())
    shown = [
        {"pair_id": item["id"], **item["fields"], **item["metadata"], "responses": item["responses"]}
        for item in records
    ]
    for i, question in enumerate(QUESTIONS):
        text = CHAT_TEXT if i == 0 else question.prompt
        common = {"pair_id": question.pair_id, "round": 3, "first": question.first, "second": question.second}
        to_fill = {"preference": "", "annotator": "", "weight": None}
        assert lines[i] == {**common, "prompt": question.prompt, **to_fill}
        assert tasks[i] == {**common, "prompt": text}
        assert shown[i] == {**common, "prompt": text, "responses": {}}
        in_cells = {"pair_id": "'" + question.pair_id, "round": "3", "weight": ""}
        assert table[i] == {**common, "prompt": text, **to_fill, **in_cells}
    assert not [path for path in tmp_path.iterdir() if "0.123456" in path.read_text()]


def test_spreadsheet_programs_find_utf8_and_no_formulas(tmp_path: pathlib.Path) -> None:
    formulas = ["=cmd|' /C calc'!A0", "+1", "-1", "@SUM(1)", "\t=1", "\r\n=1", "＝1", "\0=1"]
    formats.write(tmp_path, [Question("=1", text, text, "a=1", None, 0) for text in formulas])
    assert (tmp_path / "pairs.csv").read_bytes().startswith(b'\xef\xbb\xbf"pair_id","round",')
    for row, text in zip(read_table(tmp_path / "pairs.csv"), formulas, strict=True):
        assert row["pair_id"] == "'=1"
        assert row["prompt"] == row["first"] == "'" + text
        assert row["second"] == "a=1"


def test_a_text_too_long_for_a_cell_says_that_it_was_cut(tmp_path: pathlib.Path) -> None:
    formats.write(tmp_path, [Question("p1", "🤖" * 16_000, "a" + "🤖" * 16_000, "x" * 40_000, None, 0)])
    (row,) = read_table(tmp_path / "pairs.csv")
    note = "\n[cut here, being too long for a cell: pairs.jsonl has the whole text]"
    assert row["prompt"] == "🤖" * 16_000
    assert row["first"] == "a" + "🤖" * 15_999 + note
    assert row["second"] == "x" * 32_000 + note
    assert json.loads((tmp_path / "pairs.jsonl").read_text())["second"] == "x" * 40_000


def test_the_tools_offer_every_preference_under_the_names_that_are_read(tmp_path: pathlib.Path) -> None:
    formats.write(tmp_path, QUESTIONS)
    view = xml.etree.ElementTree.parse(tmp_path / "label_studio_config.xml")
    (control,) = view.iter("Choices")
    assert control.get("name") == "preference" and control.get("choice") == "single-radio"
    assert [option.get("alias") for option in control] == list(PREFERENCES)
    assert {text.get("value") for text in view.iter("Text")} == {"$prompt", "$first", "$second"}

    layout = json.loads((tmp_path / "argilla_settings.json").read_text())
    (question,) = layout["questions"]
    assert question["name"] == "preference"
    assert [option["value"] for option in question["settings"]["options"]] == list(PREFERENCES)
    assert [field["name"] for field in layout["fields"]] == ["prompt", "first", "second"]


texts = st.text(max_size=20)
question_lists = st.lists(
    st.builds(
        Question,
        pair_id=st.text(min_size=1, max_size=20),
        prompt=texts | st.lists(st.fixed_dictionaries({"role": texts, "content": texts}), max_size=3),
        first=texts,
        second=texts,
        score=st.none() | st.floats(allow_nan=False),
        round=st.integers(0, 99),
    ),
    min_size=1,
    max_size=4,
)


@given(question_lists, st.data())
@settings(deadline=None, max_examples=80)
def test_any_questions_and_any_answers_come_back(questions: list[Question], data: st.DataObject) -> None:
    count = len(questions)
    answers = data.draw(st.lists(st.sampled_from(PREFERENCES), min_size=count, max_size=count))
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        formats.write(folder, questions)
        fill_lines(folder / "pairs.jsonl", answers)
        fill_table(folder / "pairs.csv", answers, data.draw(st.sampled_from(",;\t")))
        for source in ("pairs.jsonl", "pairs.csv"):
            expected = [Label(q.pair_id, answer, source) for q, answer in zip(questions, answers, strict=True)]
            assert formats.read(folder / source) == expected


# Flat answers


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *((name, name) for name in PREFERENCES),
        *((value, "first") for value in ("1", "a", "LEFT", " First\n", 1)),
        *((value, "second") for value in ("2", "B", "right", 2)),
        ("Both_Bad\u00a0", "both_bad"),
    ],
)
def test_spellings_of_a_preference(tmp_path: pathlib.Path, value: Any, expected: Preference) -> None:
    path = file(tmp_path, "a.jsonl", {"pair_id": "p1", "preference": value})
    assert formats.read(path) == [Label("p1", expected, "a.jsonl")]
    path = file(tmp_path, "a.csv", table_text([{"pair_id": "p1", "preference": str(value)}]))
    assert formats.read(path) == [Label("p1", expected, "a.csv")]


def test_every_field_of_a_row(tmp_path: pathlib.Path) -> None:
    fields = {"pair_id": "p1", "preference": "tie", "annotator": "Ann, B.", "time": "2026-01-31T13:00:00+01:00"}
    expected = Label("p1", "tie", "a", "Ann, B.", 0.25, "2026-01-31T12:00:00+00:00")
    rows = {
        "a.jsonl": json.dumps({**fields, "weight": 0.25}) + "\n",
        "a.json": [{**fields, "confidence": 0.25, "weight": None}],
        "a.csv": table_text([{**fields, "weight": "0.25"}]),
        "a.tsv": table_text([{**fields, "confidence": "2.5e-1", "weight": " "}], "\t"),
    }
    for name, content in rows.items():
        (found,) = formats.read(file(tmp_path, name, content))
        assert found == Label(**{**vars(expected), "source": name})
    path = file(
        tmp_path, "b.json", [{"pair_id": "p1", "preference": "tie", "annotator": 7, "time": "2026-01-31T12:00"}]
    )
    assert formats.read(path) == [Label("p1", "tie", "b.json", "7", 1.0, "2026-01-31T12:00:00+00:00")]


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", '{"pair_id": "p", "preference": 1}'), ("a.json", '[{"pair_id": "p", "preference": 1}]')],
)
def test_json_with_a_byte_order_mark(tmp_path: pathlib.Path, name: str, content: str) -> None:
    assert formats.read(file(tmp_path, name, "\ufeff" + content)) == [Label("p", "first", name)]


def test_answers_of_several_annotators_in_their_order_without_those_that_have_not_come(tmp_path: pathlib.Path) -> None:
    rows = [("p1", "first", "Ann"), ("p2", "", "Ann"), ("p1", "second", "Bo"), ("p3", None, "Bo"), ("p4", " ", "")]
    lines = [json.dumps(dict(zip(("pair_id", "preference", "annotator"), row, strict=True))) for row in rows]
    expected = [Label("p1", "first", "a.jsonl", "Ann"), Label("p1", "second", "a.jsonl", "Bo")]
    assert formats.read(file(tmp_path, "a.jsonl", "\n\n".join(lines))) == expected


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_tables_as_spreadsheet_programs_save_them(tmp_path: pathlib.Path, delimiter: str, mark: str, end: str) -> None:
    rows = [
        ["notes", " preference ", "round", "pair_id", "prompt"],
        ['"a, b; c\td"', "first", "1", "'00123", '"two\nlines ""quoted"""'],
        ["", "tie", "1", "1e5"],  # the last cells left out
        ["", "", "", "", ""],
        ["", "skip", "1", '"a,b;c\td"', "", ""],  # an empty column more
        [""],
    ]
    text = mark + "".join(delimiter.join(row) + end for row in rows)
    expected = [("00123", "first"), ("1e5", "tie"), ("a,b;c\td", "skip")]
    found = formats.read(file(tmp_path, "a.csv", text))
    assert [(label.pair_id, label.preference) for label in found] == expected


# Label Studio


def test_label_studio_export(tmp_path: pathlib.Path) -> None:
    pairwise = {"id": "x", "from_name": "pw", "to_name": "first,second", "type": "pairwise"}
    comment = {"from_name": "why", "to_name": "prompt", "type": "textarea", "value": {"text": ["so"]}}
    tasks = [
        task(
            annotation([choice("tie"), comment], author={"id": 1, "email": "ann@example.org", "first_name": "Ann"}),
            annotation([{**pairwise, "value": {"selected": "left"}}], author="bo@example.org"),
            annotation([choice("second")], author={"id": 3}),
            annotation([], author=4, cancelled=True),
            annotation([], author=5),
        ),
        task(pair_id="p2"),
        task(annotation([{**pairwise, "value": {"selected": "right"}}], author=None), pair_id="p3"),
    ]
    assert formats.read(file(tmp_path, "export.json", tasks)) == [
        Label("p1", "tie", "export.json", "ann@example.org", 1.0, TIME),
        Label("p1", "first", "export.json", "bo@example.org", 1.0, TIME),
        Label("p1", "second", "export.json", "3", 1.0, TIME),
        Label("p1", "skip", "export.json", "4", 1.0, TIME),
        Label("p3", "second", "export.json", "", 1.0, TIME),
    ]


def test_label_studio_json_min_and_csv(tmp_path: pathlib.Path) -> None:
    data = {"round": 1, "prompt": "a", "first": "b", "second": "c"}
    times = {"created_at": "2026-03-09T22:16:08.7Z", "updated_at": "2026-03-09T22:17:00.000000Z", "lead_time": 3.5}
    rows: list[dict[str, Any]] = [
        {"pair_id": "p1", **data, "id": 11, "preference": "tie", "annotator": 1, "annotation_id": 5, **times},
        {
            "pair_id": "p2",
            **data,
            "id": 12,
            "preference": [{"selected": "left"}],
            "annotator": "bo@example.org",
            "annotation_id": 6,
            **times,
        },
        {"pair_id": "p3", **data, "id": 13, "annotator": None, "annotation_id": None, **dict.fromkeys(times)},
    ]
    assert formats.read(file(tmp_path, "min.json", rows)) == [
        Label("p1", "tie", "min.json", "1", 1.0, TIME),
        Label("p2", "first", "min.json", "bo@example.org", 1.0, TIME),
    ]
    table = (
        '"annotation_id","annotator","created_at","first","id","lead_time","pair_id","preference","updated_at"\n'
        '5,"ann@example.org","2026-03-09T22:16:08.7Z","b",11,3.5,"p1","both_bad","2026-03-09T22:17:00.000000Z"\n'
        '"","","","b",12,"","p2","",""\n'
    )
    expected = [Label("p1", "both_bad", "export.csv", "ann@example.org", 1.0, TIME)]
    assert formats.read(file(tmp_path, "export.csv", table)) == expected


@pytest.mark.parametrize(
    ("tasks", "problem"),
    [
        ([task(pair_id="")], "export.json: record 1: pair_id is an empty string; expected the pair's id"),
        ([task(), task(pair_id=5)], "export.json: record 2: pair_id is a number"),  # type: ignore[arg-type]
        ([{"data": {"text": "x"}}], "record 1: there is no pair_id"),
        ([task(annotation([choice("third")]))], "record 1, annotation 1: preference is 'third'; expected first"),
        (
            [task(annotation([choice("first"), choice("tie")]))],
            "annotation 1: these are chosen: 'first', 'tie'; expected one choice",
        ),
        (
            [task(annotation([choice("first", name="better")]))],
            "annotation 1: the controls are better; expected .* named preference.*: use label_studio_config.xml",
        ),
        (
            [task(annotation([{**choice("x"), "value": {"text": "first"}}]))],
            "annotation 1: the value of the control is {'text': 'first'}; expected",
        ),
        ([task(annotation([{**choice("x"), "value": None}]))], "the value of the control is null"),
        ([task(annotation(["first"]))], "annotation 1: result holds a string; expected a list of objects"),
        ([{**task(), "annotations": {}}], "record 1: annotations is an object; expected a list of objects"),
        ([{"pair_id": "p1", "annotation_id": 5, "pw": "first"}], "record 1: there is no preference"),
    ],
)
def test_label_studio_exports_that_are_refused(tmp_path: pathlib.Path, tasks: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        formats.read(file(tmp_path, "export.json", tasks))


# Argilla


def test_argilla_export(tmp_path: pathlib.Path) -> None:
    records = [
        record({"preference": [{"value": "first", "user_id": "u1"}, {"value": "tie", "user_id": "u2"}], "why": []}),
        record({"preference": [{"value": "second", "user_id": "u1"}]}, status="pending", pair_id="p2"),  # a draft
        record({}, pair_id="p3"),
        record(
            {
                "preference": [
                    {"value": "both_bad", "user_id": "u1", "status": "submitted"},
                    {"value": "first", "user_id": "u2", "status": "draft"},
                    {"value": "first", "user_id": "u3", "status": "discarded"},
                    {"value": None, "user_id": "u4", "status": "discarded"},
                ]
            },
            status="pending",
            pair_id="p4",
        ),
        record(None, pair_id="p5"),
    ]
    assert formats.read(file(tmp_path, "records.json", records)) == [
        Label("p1", "first", "records.json", "u1"),
        Label("p1", "tie", "records.json", "u2"),
        Label("p4", "both_bad", "records.json", "u1"),
        Label("p4", "skip", "records.json", "u3"),
        Label("p4", "skip", "records.json", "u4"),
    ]
    without_status = {"id": "p1", "fields": {}, "responses": {"preference": [{"value": "tie", "user_id": "u1"}]}}
    lines = json.dumps(without_status)
    assert formats.read(file(tmp_path, "records.jsonl", lines)) == [Label("p1", "tie", "records.jsonl", "u1")]


def test_argilla_flat_export(tmp_path: pathlib.Path) -> None:
    users, statuses = ["u1", "u2", "u3"], ["submitted", "discarded", "draft"]
    records = [
        flat_record("p1", ["first", "tie", "tie"], users, statuses),
        flat_record("p2", None, None, None),
        {"id": "p3", "status": "pending", "_server_id": None, "prompt": "a", "preference.suggestion": "first"},
    ]
    expected = [Label("p1", "first", "flat.json", "u1"), Label("p1", "skip", "flat.json", "u2")]
    assert formats.read(file(tmp_path, "flat.json", records)) == expected


@pytest.mark.parametrize(
    ("records", "problem"),
    [
        ([record({}, pair_id="")], "records.json: record 1: id is an empty string; expected the pair's id"),
        (
            [record({}), record({"preference": [{"value": "c", "user_id": "u"}]})],
            "record 2, response 1: preference is 'c'; expected first",
        ),
        (
            [record({"preference": [{"value": "tie", "user_id": "u", "status": "done"}]})],
            "response 1: status is 'done'; expected submitted, draft or discarded",
        ),
        (
            [record({"label": [{"value": "tie", "user_id": "u"}]})],
            "record 1: the questions are label; expected one named preference: use argilla_settings.json",
        ),
        ([record([])], None),
        ([record(["tie"])], "record 1: responses is a list; expected an object"),
        ([record({"preference": "tie"})], "responses.preference is a string; expected a list of objects"),
        (
            [flat_record("p1", ["tie"], [], ["submitted"])],
            "record 1: the responses are .* expected lists of one length",
        ),
    ],
)
def test_argilla_exports_that_are_refused(tmp_path: pathlib.Path, records: Any, problem: str | None) -> None:
    path = file(tmp_path, "records.json", records)
    if problem is None:
        assert formats.read(path) == []
    else:
        with pytest.raises(ValueError, match=problem):
            formats.read(path)


# Files that are refused

TIE = '{"pair_id": "p1", "preference": "tie"}\n'


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        (
            "a.xlsx",
            b"PK",
            r"a.xlsx: the suffix is '.xlsx'; expected one of .jsonl, .csv, .tsv, .json: rename or export",
        ),
        ("a.jsonl", b"", "a.jsonl: the file is empty; expected answers: save or export it again"),
        ("a.csv", b" \n", "a.csv: the file is empty"),
        ("a.json", b"", "a.json: the file is empty"),
        ("a.jsonl", TIE + TIE[:20], r"a.jsonl:2: this is not JSON .*: mend or delete the line"),
        ("a.jsonl", TIE + "[]", "a.jsonl:2: the line is an empty list; expected a JSON object"),
        ("a.jsonl", TIE.encode("utf-16"), "a.jsonl:1: this is not UTF-8 .*: save the file in UTF-8"),
        (
            "a.json",
            "[\n" + TIE,
            r"a.json:3: this is not JSON .* expected one JSON list: export it again: it may be cut",
        ),
        ("a.json", TIE, "a.json: the file is an object; expected a JSON list of objects: export all records together"),
        ("a.json", "[" + TIE + ", null]", "a.json: record 2: this is null; expected a JSON object"),
        ("a.json", TIE.encode("utf-16"), "a.json: this is not UTF-8 .*: save or export it in UTF-8"),
        ("a.csv", "pair_id,preference\nñ,tie".encode("cp1252"), "a.csv: this is not UTF-8 .*: save it as `CSV UTF-8`"),
        ("a.csv", "p1,tie\np2,tie\n", "a.csv:1: the line is 'p1,tie'; expected the names of the columns"),
        (
            "a.csv",
            "pair_id,prefer\np2,tie\n",
            "a.csv:1: the line is 'pair_id,prefer'; .*: copy the line from pairs.csv",
        ),
        ("a.csv", "pair_id,preference,preference\n", "a.csv:1: there are 2 columns preference; expected one"),
        ("a.csv", 'pair_id,preference\n"a\nb",tie\np2,tie,x\n', "a.csv:4: the row has 3 cells; expected 2"),
        ("a.csv", 'pair_id,preference\np1,tie\n"p2', "a.csv:3: this is not CSV .*: save it again: it may be cut short"),
        ("a.csv", 'pair_id,preference\n"p1"x,tie\n', "a.csv:2: this is not CSV"),
        ("a.csv", 'pair_id,preference,"a\nb"\n,tie\n', "a.csv:3: pair_id is an empty string; expected the pair's id"),
        ("a.csv", "pair_id,preference\np1,3\n", r"a.csv:2: preference is '3'; expected first \(or 1, a, left\)"),
        (
            "a.csv",
            'pair_id,preference,weight\np1,tie,"0,5"\n',
            "a.csv:2: weight is '0,5'; expected a number such as 0.5",
        ),
        ("a.csv", "pair_id,preference,time\np1,tie,today\n", "a.csv:2: time is 'today'; expected a time such as 2026-"),
    ],
)
def test_files_that_are_refused(tmp_path: pathlib.Path, name: str, content: str | bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as error:
        formats.read(file(tmp_path, name, content))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"pair_id": 5}, "a.jsonl:1: pair_id is a number; expected the pair's id, a non-empty string"),
        ({"preference": "both bad"}, "preference is 'both bad'; expected first .* tie, both_bad, skip, or nothing"),
        ({"preference": True}, "preference is a boolean"),
        ({"preference": ["first"]}, "preference is a list"),
        ({"preference": 0}, "preference is 0"),
        ({"annotator": ["Ann"]}, "annotator is a list; expected a name"),
        ({"time": 5}, "time is 5; expected a time"),
        ({"time": "0001-01-01T00:00+05:00"}, "time is '0001"),
        ({"weight": 1, "confidence": 1}, "both weight and confidence are filled in; expected one of them"),
        *(
            ({"weight": value}, "weight is .*; expected a number such as 0.5, above 0 and at most 1000000")
            for value in (0, -1, 1e6 + 1, 10**400, float("nan"), float("inf"), True, [1], "much", "nan")
        ),
        ({"confidence": 0}, "confidence is 0"),
    ],
)
def test_fields_that_are_refused(tmp_path: pathlib.Path, fields: dict[str, Any], problem: str) -> None:
    path = file(tmp_path, "a.jsonl", {"pair_id": "p1", "preference": "tie", **fields})
    with pytest.raises(ValueError, match=problem):
        formats.read(path)


def test_rows_that_lack_a_field_and_files_that_are_not_there(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="a.jsonl:1: there is no pair_id; expected the pair's id"):
        formats.read(file(tmp_path, "a.jsonl", {"preference": "tie"}))
    with pytest.raises(ValueError, match="a.json: record 1: there is no preference; expected it, empty where there is"):
        formats.read(file(tmp_path, "a.json", [{"pair_id": "p1", "Preference": "tie"}]))
    with pytest.raises(ValueError, match="b.json: no such file"):
        formats.read(tmp_path / "b.json")
    assert formats.read(file(tmp_path, "c.json", [])) == []


@pytest.mark.parametrize(
    ("name", "content", "location"),
    [
        ("a.csv", "pair_id,preference\n'00123,first\n123,tie\n", "a.csv:3"),
        (
            "a.jsonl",
            [{"pair_id": "00123", "preference": "first"}, {"pair_id": "123", "preference": "tie"}],
            "a.jsonl:2",
        ),
        (
            "studio.json",
            [
                {
                    "data": {"pair_id": name},
                    "annotations": [{"result": [{"type": "pairwise", "value": {"selected": "left"}}]}],
                }
                for name in ("00123", "123")
            ],
            "studio.json: record 2",
        ),
        (
            "argilla.json",
            [
                {"id": name, "fields": {}, "responses": {"preference": [{"value": "first", "user_id": "u"}]}}
                for name in ("00123", "123")
            ],
            "argilla.json: record 2",
        ),
    ],
)
def test_an_answer_to_a_pair_that_was_not_asked_about(
    tmp_path: pathlib.Path, name: str, content: Any, location: str
) -> None:
    text = "".join(json.dumps(row) + "\n" for row in content) if name.endswith(".jsonl") else content
    path = file(tmp_path, name, text)
    assert len(formats.read(path)) == 2 == len(formats.read(path, ["00123", "123"]))
    with pytest.raises(ValueError, match=rf"{location}: there is no pair '123'; .*: copy the id .* a number or a date"):
        formats.read(path, IDS)


def test_what_is_not_answered_may_be_about_anything(tmp_path: pathlib.Path) -> None:
    assert formats.read(file(tmp_path, "a.csv", "pair_id,preference\n123,\n"), IDS) == []
