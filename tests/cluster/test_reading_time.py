"""Reading an answer takes time in proportion to its length, whatever is in it: nobody's text costs the others their turn."""

from __future__ import annotations

import random
import time

import pytest
from grammar_walk import read
from test_nothing_lost import marks_of

from kvasir.cluster.tool_formats import TOOL_FORMATS

SCHEMAS = {"f": {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "object"}}}}
LENGTH = 4_000
"""Characters of the shorter text; the other has four times as many."""
MOST = 9.0
"""Times as long it may take: 4 in proportion, 16 where all is read anew for each piece."""
SMALL_S = 0.02
"""Differences that say nothing."""


def texts(form):
    """Pieces of which long texts are made, each with what stands before it once."""
    marks, dice = marks_of(form), random.Random(3)
    begin = form.begins[0] if form.begins else form.wrap[0]
    opened = max((mark for mark in marks if begin in mark), key=len, default=begin)
    yield "", opened
    yield begin, form.call[0].replace("NAME", "f") + "w"
    yield begin, form.call[0].replace("NAME", "f") + "{"
    yield opened, "["
    yield begin, "w"
    yield "", "".join(dice.choice([*marks, "{", "[", '"', "x ", "\n"]) for _ in range(60))


def seconds(form, text):
    """Of this thread: read in pieces, as they come."""
    began = time.thread_time()
    read(form, text, SCHEMAS, cuts=range(3, len(text), 3))
    return time.thread_time() - began


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_time_grows_as_the_text(name):
    form = TOOL_FORMATS[name]
    for before, piece in texts(form):
        short, long = (before + piece * (length // len(piece)) for length in (LENGTH, 4 * LENGTH))
        ratios = []
        while not ratios or (ratios[-1] > MOST and len(ratios) < 3):  # something else may have had the core's caches
            taken = seconds(form, short)
            ratios.append((seconds(form, long) - SMALL_S) / taken)
        assert min(ratios) <= MOST, (ratios, before, piece)
