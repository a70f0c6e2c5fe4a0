"""Grammar libraries on the shared schemas: share compiled, soundness, compile time, mask time per token.

    python benchmarks/grammar.py [--library llguidance|xgrammar] [--data ../shared/data] [--model skald]

Prints one JSON line. Instances are the data's own: a valid one that is refused is "rejected", an invalid one that is
accepted "unsound".
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from kvasir.engine.config import EngineConfig
from kvasir.engine.errors import KvasirError
from kvasir.engine.grammar import LIMITS, Vocabulary
from kvasir.engine.grammar_text import grammar_text
from kvasir.engine.model_files import ModelFiles
from kvasir.engine.request import StructuredOutput


class Guidance:
    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.mask = np.zeros(-(-vocabulary.size // 32), np.int32)

    def compile(self, schema: Any) -> Any:
        from llguidance import LLMatcher

        text = grammar_text(StructuredOutput(json=json.dumps(schema)), {})
        found = LLMatcher(self.vocabulary.compiled, text, log_level=0, limits=LIMITS)
        if found.is_error():
            raise ValueError(found.get_error())
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
        files = sorted((data / "structured-jsonschemabench/share").glob("*.json"))
        return [json.loads(file.read_text()) for file in files]
    files = sorted((data / "structured-json-schema-test-suite/tests/draft2020-12").glob("*.json"))
    return [case for file in files for case in json.loads(file.read_text())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", choices=["llguidance", "xgrammar"], default="llguidance")
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared/data")
    parser.add_argument("--model", default="skald")
    parser.add_argument("--set", choices=["jsonschemabench", "suite"], default="jsonschemabench")
    args = parser.parse_args()
    tokenizer = ModelFiles(EngineConfig(model=args.model)).tokenizer()
    assert tokenizer is not None
    vocabulary = Vocabulary(tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids)
    library = {"llguidance": Guidance, "xgrammar": XGrammar}[args.library](vocabulary)
    found = measure(library, vocabulary, cases_in(args.data, args.set))
    print(json.dumps({"library": args.library, "set": args.set, "vocabulary": vocabulary.size, **found}))


if __name__ == "__main__":
    main()
