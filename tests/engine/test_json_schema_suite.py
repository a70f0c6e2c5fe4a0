"""The official JSON Schema suite: of the schemas that compile no valid value is rejected, and no invalid one let through, but for
those that are named here."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from grammar import MAX_ORDERS, Guidance, orders, spellings, suite_groups, taken

from kvasir.engine.config import EngineConfig
from kvasir.engine.errors import KvasirError
from kvasir.engine.grammar import Vocabulary
from kvasir.engine.model_files import ModelFiles

REJECTED = {
    "is only an annotation by default": 10,  # a format that a request asks for is held to, as OpenAI's clients expect
    "leap second, positive time-offset": 2,  # a leap second is written in UTC: in other zones each offset has its minute
    "leap second, large positive time-offset": 2,
    "leap second, negative time-offset": 2,
    "leap second, large negative time-offset": 2,
    "leap second, with minus offset": 3,
}
"""Of valid instances: the end of what they are called in the suite -> how often it is there in its three drafts."""
ACCEPTED = {
    "optional/format/hostname": 46,  # labels in Punycode are taken without decoding them
    "optional/content": 4,  # contentEncoding and contentMediaType are annotations
}
"""Of invalid ones, by their file: in the optional part alone."""


@pytest.fixture(scope="module")
def found(data):
    """(valid ones that are rejected, invalid ones that are accepted), each by (file, name of the instance)."""
    tokenizer = ModelFiles(EngineConfig(model="skald")).tokenizer()
    vocabulary = Vocabulary(tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids)
    library, wrong, compiled = Guidance(vocabulary), {True: Counter(), False: Counter()}, 0
    for _, keyword, group in suite_groups(data("structured-json-schema-test-suite").parent):
        try:
            grammar = library.compile(group["schema"])
        except KvasirError:
            continue
        compiled += 1
        for test in group["tests"]:
            if taken(library, grammar, vocabulary, test["data"], numbers=test["valid"]) != test["valid"]:
                wrong[test["valid"]][keyword, test["description"]] += 1
    assert compiled > 550
    return wrong[True], wrong[False]


def test_valid_values_are_never_rejected(found):
    counts = Counter()
    for (keyword, name), count in found[0].items():
        ends = [end for end in REJECTED if name.endswith(end)]
        assert ends, (keyword, name)
        counts[max(ends, key=len)] += count
    assert counts == REJECTED


def test_invalid_values_are_never_accepted(found):
    counts = Counter()
    for (keyword, _), count in found[1].items():
        counts[keyword] += count
    assert counts == ACCEPTED


def test_of_a_value_with_many_members_a_few_orders_are_tried():
    inside = {"inside": {f"{number}": number for number in range(12)}}
    assert len([*orders(inside, MAX_ORDERS)]) == MAX_ORDERS
    assert [*spellings([inside] * 9, numbers=False)] == [[inside] * 9]
    assert [*orders({"a": {"b": 1, "c": 2}, "d": 3}, 3)] == [{"a": {"b": 1, "c": 2}, "d": 3}] * 3
    assert [[*one] for one in orders({"a": 1, "b": 2}, 9)] == [["a", "b"], ["b", "a"]]
