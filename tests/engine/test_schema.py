"""Narrowed formats, as the compiled grammar takes them, against the calendar and the RFCs."""

from __future__ import annotations

import calendar
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvasir.engine.config import EngineConfig
from kvasir.engine.grammar import Grammars
from kvasir.engine.model_files import ModelFiles
from kvasir.engine.request import StructuredOutput
from kvasir.engine.schema import narrowed

DATE = {"type": "string", "format": "date"}
LABEL = "a" * 60
YEARS = st.one_of(st.integers(1, 9999), st.sampled_from([1900, 2000, 2100, 2400]))


@pytest.fixture(scope="module")
def takes():
    """`takes(StructuredOutput, text)`: is the text a whole output of the engine's grammar?"""
    tokenizer = ModelFiles(EngineConfig(model="skald")).tokenizer()
    grammars = Grammars(lambda: tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids)
    vocabulary = grammars.vocabulary()

    def run(wanted: StructuredOutput, text: str) -> bool:
        matcher, tokens = grammars.compiled(wanted).matcher.deep_copy(), vocabulary(text)
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    yield run
    grammars.shutdown()


@given(year=YEARS, month=st.integers(1, 12), day=st.integers(1, 31))
def test_dates_are_those_of_the_calendar(takes, year, month, day):
    exists = day <= calendar.monthrange(year, month)[1]
    text = f"{year:04}-{month:02}-{day:02}"
    assert takes(StructuredOutput(json=json.dumps(DATE)), json.dumps(text)) == exists
    moment = StructuredOutput(json=json.dumps(DATE | {"format": "date-time"}))
    assert takes(moment, json.dumps(f"{text}T10:20:30.5+01:00")) == exists


@pytest.mark.parametrize(
    ("schema", "value", "fits"),
    [
        ({"format": "time"}, "23:59:60Z", True),
        ({"format": "time"}, "23:59:60.25-00:00", True),
        ({"format": "time"}, "22:59:60Z", False),
        ({"format": "time"}, "23:59:60+01:00", False),
        ({"format": "time"}, "08:30:06.283185Z", True),
        ({"format": "date-time"}, "1998-12-31T23:59:60Z", True),
        ({"format": "date-time"}, "1998-12-31T23:58:60Z", False),
        ({"format": "hostname"}, ".".join([LABEL] * 4), True),
        ({"format": "hostname"}, ".".join([LABEL] * 5), False),
        ({"format": "date"}, 7, True),
        *(
            ({"format": hint}, "any text", True)
            for hint in ("password", "binary", "path", "file-path", "directory-path")
        ),
        ({"format": "password", "minLength": 4}, "any", False),
        (DATE | {"pattern": "^2024"}, "2024-02-29", True),
        (DATE | {"pattern": "^2024"}, "2020-02-29", False),
        (DATE | {"allOf": [{"pattern": "^2023"}]}, "2023-02-28", True),
        (DATE | {"allOf": [{"pattern": "^2023"}]}, "2023-02-29", False),
        ({"anyOf": [DATE, {"type": "null"}]}, "2023-02-29", False),
        ({"anyOf": [DATE, {"type": "null"}]}, None, True),
        ({"enum": [{"format": "date"}]}, {"format": "date"}, True),
        ({"properties": {"format": {"const": "date"}}}, {"format": "date"}, True),
        ({"oneOf": [{"const": 1, "title": "low"}, {"const": 2}, {"enum": [True, None]}]}, 2, True),
        ({"oneOf": [{"const": 1}, {"const": 2}]}, 3, False),
        ({"oneOf": [{"const": 1}, {"const": 2}], "anyOf": [{"const": 2}, {"type": "string"}]}, 2, True),
        ({"oneOf": [{"const": 1}, {"const": 2}], "anyOf": [{"const": 2}, {"type": "string"}]}, 1, False),
        ({"$ref": "#/$defs/day", "$defs": {"day": DATE}}, "2023-02-29", False),
    ],
)
def test_formats_are_narrowed(takes, schema, value, fits):
    assert takes(StructuredOutput(json=json.dumps(schema)), json.dumps(value)) == fits
    tag = {"format": {"type": "json_schema", "json_schema": schema}}
    assert takes(StructuredOutput(structural_tag=json.dumps(tag)), json.dumps(value)) == fits


@pytest.mark.parametrize("branches", [[1, 2, 1.0], [1, [1]], ["a", "b"]])
def test_values_that_arent_numbers_apart_are_left_to_the_library(branches):
    schema = {"oneOf": [{"const": value} for value in branches]}
    assert narrowed(schema) == schema


def test_other_schemas_stay_as_they_are():
    schema = {
        "type": "object",
        "properties": {"format": {"type": "string"}, "at": {"format": "uuid"}},
        "enum": [DATE],
        "format": 3,
    }
    assert narrowed(schema) == schema
