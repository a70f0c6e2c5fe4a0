"""Grammar libraries on recorded schemas: share compiled, soundness, compile time, mask time per token.

    python benchmarks/grammar.py [--library llguidance|xgrammar] [--data FOLDER] [--model skald]
    python benchmarks/grammar.py --keywords [--set suite] [--json FILE]

Prints one JSON line. Instances are the data's own: a valid one that is refused is "rejected", an invalid one that is
accepted "unsound".

With --keywords: Markdown tables of what the engine does with each keyword of the official suite and with each set of
JSONSchemaBench. What counts is the value: a valid instance is accepted when it is in one of its spellings (members in
any order, 1 for 1.0; without spaces and as json.dumps writes it), an invalid one when it is in any.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from recorded import DATA, recorded

from kvasir.engine.config import EngineConfig
from kvasir.engine.errors import KvasirError
from kvasir.engine.grammar import LIMITS, Vocabulary, refusal
from kvasir.engine.grammar_text import grammar_text
from kvasir.engine.model_files import ModelFiles
from kvasir.engine.request import StructuredOutput

DIALECTS = {
    "draft2020-12": "https://json-schema.org/draft/2020-12/schema",
    "draft7": "http://json-schema.org/draft-07/schema#",
    "draft4": "http://json-schema.org/draft-04/schema#",
}
"""The drafts that the suite has, newest first, and how a schema says that it is written in one."""
SPELLINGS = ((",", ":"), (", ", ": "))
"""Separators of items and keys: compact, and json.dumps' own."""
MAX_ORDERS = 24
"""Of an instance's members, unless it is longer than LONG characters."""
LONG = 200
COLUMNS = ("compiled", "refused", "unnamed", "valid_accepted", "valid_rejected", "invalid_rejected", "invalid_accepted")


class Guidance:
    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.mask = np.zeros(-(-vocabulary.size // 32), np.int32)

    def compile(self, schema: Any) -> Any:
        from llguidance import LLMatcher

        wanted = StructuredOutput(json=json.dumps(schema))
        found = LLMatcher(self.vocabulary.compiled, grammar_text(wanted, {}), log_level=0, limits=LIMITS)
        if found.is_error():
            raise refusal(wanted, found.get_error())
        return found

    def start(self, grammar: Any) -> Any:
        return grammar.deep_copy()

    def fill(self, matcher: Any) -> None:
        matcher.unsafe_compute_mask_ptr(self.mask.ctypes.data, self.mask.nbytes)

    def push(self, matcher: Any, token: int) -> bool:
        return bool(matcher.try_consume_tokens([token]) == 1)

    def may_end(self, matcher: Any) -> bool:
        return bool(matcher.is_accepting())


class XGrammar:
    def __init__(self, vocabulary: Vocabulary) -> None:
        import xgrammar

        self.library, size = xgrammar, vocabulary.size
        tokens = [b"" if token in vocabulary.special_token_ids else vocabulary.tokens[token] for token in range(size)]
        info = xgrammar.TokenizerInfo(tokens, vocab_size=size, stop_token_ids=[vocabulary.eos_token_id])
        self.compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        self.mask = xgrammar.allocate_token_bitmask(1, size)

    def compile(self, schema: Any) -> Any:
        return self.compiler.compile_json_schema(json.dumps(schema), any_whitespace=True, strict_mode=False)

    def start(self, grammar: Any) -> Any:
        return self.library.GrammarMatcher(grammar, terminate_without_stop_token=True)

    def fill(self, matcher: Any) -> None:
        matcher.fill_next_token_bitmask(self.mask)

    def push(self, matcher: Any, token: int) -> bool:
        return not matcher.is_terminated() and bool(matcher.accept_token(token))

    def may_end(self, matcher: Any) -> bool:
        return bool(matcher.is_completed() if hasattr(matcher, "is_completed") else matcher.is_terminated())


def measure(library: Any, vocabulary: Vocabulary, cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Over schemas with their instances."""
    counts: Counter[str] = Counter()
    compiling: list[float] = []
    masking: list[float] = []
    for case in cases:
        start = time.perf_counter()
        try:
            grammar = library.compile(case["schema"])
        except (KvasirError, ValueError, RuntimeError):
            counts["refused"] += 1
            continue
        finally:
            compiling.append(time.perf_counter() - start)
        counts["compiled"] += 1
        for test in case["tests"]:
            took: list[float] = []
            accepted = accepts(library, grammar, vocabulary(json.dumps(test["data"], ensure_ascii=False)), took)
            masking += took
            counts[
                ("unsound", "refused_invalid", "rejected", "accepted_valid")[
                    2 * test["valid"] + (accepted == test["valid"])
                ]
            ] += 1
    quantiles = {f"compile_ms_p{q}": round(float(np.percentile(compiling, q)) * 1e3, 2) for q in (50, 95, 100)}
    masks = {f"mask_us_p{q}": round(float(np.percentile(masking, q)) * 1e6, 1) for q in (50, 95, 99)}
    return {"schemas": len(cases), **counts, **quantiles, **masks}


def accepts(library: Any, grammar: Any, tokens: list[int], took: list[float]) -> bool:
    matcher = library.start(grammar)
    for token in tokens:
        start = time.perf_counter()
        library.fill(matcher)
        took.append(time.perf_counter() - start)
        if not library.push(matcher, token):
            return False
    return bool(library.may_end(matcher))


def cases_in(data: Path, which: str) -> list[dict[str, Any]]:
    """Schemas and their instances, of one of the two sets."""
    if which == "jsonschemabench":
        files = sorted(recorded("structured-jsonschemabench/share", data).glob("*.json"))
        return [json.loads(file.read_text()) for file in files]
    files = sorted((recorded("structured-json-schema-test-suite", data) / "tests/draft2020-12").glob("*.json"))
    return [case for file in files for case in json.loads(file.read_text())]


def suite_groups(data: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(draft, keyword, group) of the official suite. A group's schema says its draft, as the suite asks for it."""
    for draft, dialect in DIALECTS.items():
        folder = recorded("structured-json-schema-test-suite", data) / "tests" / draft
        for file in sorted(folder.rglob("*.json"), key=lambda file: (len(file.parts), file)):
            keyword = file.relative_to(folder).with_suffix("").as_posix()
            for group in json.loads(file.read_text()):
                schema = group["schema"]
                yield (
                    draft,
                    keyword,
                    group | {"schema": {"$schema": dialect} | schema if isinstance(schema, dict) else schema},
                )


def bench_groups(data: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """("jsonschemabench", set, schema with instances)."""
    for file in sorted(recorded("structured-jsonschemabench/share", data).glob("*.json")):
        name = file.stem.split("---")[0] if "---" in file.stem else file.stem.split("_")[0]
        yield "jsonschemabench", name, json.loads(file.read_text())


GROUPS = {"suite": suite_groups, "jsonschemabench": bench_groups}


def keywords(library: Any, vocabulary: Vocabulary, groups: Iterable[tuple[str, str, dict[str, Any]]]) -> dict[str, Any]:
    """`{source: {keyword: row}}`; a row has COLUMNS, compile times and the reasons of refusals."""
    found: dict[str, Any] = {}
    begun = time.perf_counter()
    for number, (source, keyword, group) in enumerate(groups):
        if keyword not in found.get(source, {}):
            print(
                f"{time.perf_counter() - begun:6.1f} s {number:5} schemas done, next {source} {keyword}",
                file=sys.stderr,
            )
        blank = {**dict.fromkeys(COLUMNS, 0), "compile_ms": [], "reasons": {}}
        row = found.setdefault(source, {}).setdefault(keyword, blank)
        start = time.perf_counter()
        try:
            grammar = library.compile(group["schema"])
        except KvasirError as error:
            count_refusal(row, group["schema"], str(error))
            continue
        finally:
            row["compile_ms"].append(round((time.perf_counter() - start) * 1e3, 3))
        row["compiled"] += 1
        for test in group["tests"]:
            row[outcome(library, grammar, vocabulary, test)] += 1
    return found


def count_refusal(row: dict[str, Any], schema: Any, message: str) -> None:
    """It is one by name when the message has a keyword of this schema."""
    words = set(re.findall(r"\$?\w+", message))
    row["refused"] += 1
    row["unnamed"] += not words & set(keys(schema))
    reason = re.sub(r"^structured output: this json can't be enforced: ", "", message)
    row["reasons"][reason] = row["reasons"].get(reason, 0) + 1


def keys(schema: Any) -> Iterator[str]:
    """Every key at every depth; a schema that is `false` counts as its own keyword."""
    if schema is False:
        yield "false"
    if isinstance(schema, dict):
        yield from schema
    for child in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from keys(child)


def outcome(library: Any, grammar: Any, vocabulary: Vocabulary, test: dict[str, Any]) -> str:
    """The column that an instance counts in."""
    accepted = taken(library, grammar, vocabulary, test["data"], numbers=test["valid"])
    if test["valid"]:
        return "valid_accepted" if accepted else "valid_rejected"
    return "invalid_accepted" if accepted else "invalid_rejected"


def taken(library: Any, grammar: Any, vocabulary: Vocabulary, value: Any, *, numbers: bool) -> bool:
    """Whether a value is accepted: in a spelling that is accepted with and without spaces; an invalid one in either."""
    every = all if numbers else any
    return any(
        every(fits(library, grammar, tokens_of(vocabulary, one, separators)) for separators in SPELLINGS)
        for one in spellings(value, numbers=numbers)
    )


def fits(library: Any, grammar: Any, tokens: list[int]) -> bool:
    """Whether they are a whole output; no masks are made."""
    matcher = library.start(grammar)
    return all(library.push(matcher, token) for token in tokens) and bool(library.may_end(matcher))


def tokens_of(vocabulary: Vocabulary, value: Any, separators: tuple[str, str]) -> list[int]:
    text = json.dumps(value, separators=separators, ensure_ascii=False)
    tokens = vocabulary(text)
    assert b"".join(vocabulary.tokens[token] for token in tokens) == text.encode(), text
    return tokens


def spellings(value: Any, *, numbers: bool) -> Iterator[Any]:
    """The same value: its objects' members in other orders, and its whole numbers without a fraction."""
    for order in orders(value, MAX_ORDERS if len(json.dumps(value)) < LONG else 1):
        yield order
        if numbers:
            yield whole(order)


def orders(value: Any, most: int) -> Iterator[Any]:
    """The first `most`: of an object of twelve members there are 479,001,600."""
    if isinstance(value, dict):
        members = [[(key, one) for one in orders(inner, most)] for key, inner in value.items()]
        found = (dict(chosen) for order in itertools.permutations(members) for chosen in itertools.product(*order))
        yield from itertools.islice(found, most)
    elif isinstance(value, list):
        every = itertools.product(*[[*orders(inner, most)] for inner in value])
        yield from itertools.islice(map(list, every), most)
    else:
        yield value


def whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: whole(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [whole(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def tables(found: dict[str, Any]) -> str:
    """Markdown: a table per source, a line per keyword, and the sums."""
    lines = []
    for source, rows in found.items():
        heads = (
            "keyword or set",
            "compiled",
            "valid accepted",
            "invalid rejected",
            "invalid accepted",
            "compile p50 / p95, ms",
        )
        lines += [f"## {source}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        lines += [f"| {line(keyword, [row])} |" for keyword, row in rows.items()]
        required = [row for keyword, row in rows.items() if not keyword.startswith("optional/")]
        lines += [f"| {line('all but optional', required)} |"] if len(required) < len(rows) else []
        lines += [f"| {line('all', list(rows.values()))} |", ""]
    return "\n".join(lines)


def line(keyword: str, rows: list[dict[str, Any]]) -> str:
    """Of one keyword, or of several as one; shares are of what was compiled."""
    total = {column: sum(row[column] for row in rows) for column in COLUMNS}
    groups = total["compiled"] + total["refused"]
    p50, p95 = np.percentile([ms for row in rows for ms in row["compile_ms"]], (50, 95))
    cells = [
        keyword,
        f"{total['compiled']}/{groups} ({total['compiled'] / groups:.0%})",
        share(total["valid_accepted"], total["valid_rejected"]),
        share(total["invalid_rejected"], total["invalid_accepted"]),
        str(total["invalid_accepted"]),
        f"{p50:.2f} / {p95:.2f}",
    ]
    return " | ".join(cells)


def share(right: int, wrong: int) -> str:
    return f"{right}/{right + wrong}" if right + wrong else "-"


def reasons(found: dict[str, Any]) -> str:
    """How often each reason was given, per source; numbers and addresses are left out of it."""
    lines = []
    for source, rows in found.items():
        counts: Counter[str] = Counter()
        for row in rows.values():
            for reason, count in row["reasons"].items():
                counts[re.sub(r"'[a-z-]+:/[^']*'|-?\d[\d.e]+|/\S+/", "…", reason)[:100]] += count
        unnamed = sum(row["unnamed"] for row in rows.values())
        lines += [f"{source}: {counts.total()} refused, {unnamed} of them without a keyword's name"]
        lines += [f"    {count:4} {reason}" for reason, count in counts.most_common()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", choices=["llguidance", "xgrammar"], default="llguidance")
    parser.add_argument("--data", type=Path, default=DATA, help="default: KVASIR_DATA")
    parser.add_argument("--model", default="skald")
    parser.add_argument("--set", choices=[*GROUPS], help="default: jsonschemabench; with --keywords both")
    parser.add_argument("--keywords", action="store_true", help="a table per draft and set, keyword by keyword")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    tokenizer = ModelFiles(EngineConfig(model=args.model)).tokenizer()
    assert tokenizer is not None
    vocabulary = Vocabulary(tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids)
    library = {"llguidance": Guidance, "xgrammar": XGrammar}[args.library](vocabulary)
    if args.keywords:
        chosen = [args.set] if args.set else GROUPS
        found = keywords(library, vocabulary, (group for name in chosen for group in GROUPS[name](args.data)))
        print(tables(found), reasons(found), sep="\n")
    else:
        which = args.set or "jsonschemabench"
        found = {"library": args.library, "set": which, "vocabulary": vocabulary.size}
        found |= measure(library, vocabulary, cases_in(args.data, which))
        print(json.dumps(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
