"""Does what a model without any sense writes fit the schemas that were asked for? Whole sets, with a judge of its own.

    python benchmarks/random_outputs.py --set bfcl [--format qwen3_coder] [--marks]
    python benchmarks/random_outputs.py --set jsonschemabench

The engine with random weights, at temperature 1: each function of the Berkeley leaderboard as a tool that must be called
(written in one of the formats that models are taught), or each schema of JSONSchemaBench as `response_format`. A schema is
refused by name, or every output that ends must be valid; `jsonschema` judges. Marks that end texts and objects are made
likelier (`--fond`), since random letters would hardly ever end. `--marks`: a format's marks are tokens of their own, as in the
vocabularies of most families, and made likelier too: letter by letter a closing tag hardly ever comes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
from recorded import recorded
from refusals import refuse

from engine import Bench  # a script beside this one
from kvasir.cluster.answer_parts import AnswerReader, ReadAnswer, ToolFormat
from kvasir.cluster.tool_formats import TOOL_FORMATS
from kvasir.cluster.tool_use import tool_use
from kvasir.engine.config import EngineConfig
from kvasir.engine.errors import ClientError
from kvasir.engine.event import Failed, Finished, Token
from kvasir.engine.model_files import ModelFiles
from kvasir.engine.request import Request, SamplingParams, StructuredOutput
from kvasir.engine.tokenizer import Tokenizer

TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": None}
"""Python's names of types, as BFCL has them."""
MARKS = ('"', "}", "]", '"}', "<", "</", ">", ")")


@dataclass(frozen=True)
class Case:
    """One request, and who judges what comes."""

    name: str
    wanted: StructuredOutput
    schemas: dict[str, Any]
    """Tool -> schema; or the schema itself under ''."""
    form: ToolFormat | None = None
    """How calls are written."""

    def check(self, text: str) -> None:
        """Raise unless it fits."""
        if self.form is None:
            _judge(json.loads(text), self.schemas[""])
            return
        reader, answer = AnswerReader(self.form, None, schemas=self.schemas), ReadAnswer()
        answer.add([*reader.feed(text), *reader.finish()])
        if not answer.calls or answer.content.strip():
            raise ValueError(f"not calls alone: {answer}")
        for call in answer.calls:
            _judge(json.loads(call.arguments), self.schemas[call.name])


def _judge(value: Any, schema: Any) -> None:
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    kind(schema, format_checker=kind.FORMAT_CHECKER).validate(value)


def bfcl(form: ToolFormat, counts: Counter[str]) -> Iterator[Case]:
    """Every question's functions; what is refused is counted by its reason."""
    for file in sorted(recorded("tools-bfcl/questions").glob("*.json")):
        for line in file.read_text().splitlines():
            entry = json.loads(line)
            given = entry.get("function") or []
            given = given if isinstance(given, list) else [given]
            tools = {f["name"]: {"name": f["name"], "parameters": plain(f["parameters"])} for f in given}
            counts["questions"] += 1
            counts["functions"] += len(given)
            try:
                use = tool_use(
                    [{"type": "function", "function": one} for one in tools.values()], "required", parallel=False
                )
                assert use is not None
                held = use.held(form)
            except ClientError as error:
                counts[f"refused: {error.message}"] += 1
                continue
            counts["written as JSON instead"] += held.form is not form
            yield Case(entry["id"], held.grammar, use.schemas, held.form)


def plain(schema: Any) -> Any:
    """JSON Schema of what BFCL writes with Python's types."""
    if isinstance(schema, list):
        return [plain(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: plain(value) for key, value in schema.items() if key not in ("default", "format", "optional")}
    if isinstance(schema.get("type"), str):
        found["type"] = TYPES.get(schema["type"].lower(), schema["type"].lower())
        if found["type"] not in ("object", "array", "string", "integer", "number", "boolean", "null"):
            del found["type"]
    return found


def jsonschemabench(counts: Counter[str]) -> Iterator[Case]:
    """Every schema of the set."""
    for file in sorted(recorded("structured-jsonschemabench/share").glob("*.json")):
        schema = json.loads(file.read_text())["schema"]
        counts["schemas"] += 1
        yield Case(file.stem, StructuredOutput(json=json.dumps(schema)), {"": schema})


def fond_of(tokenizer: Tokenizer, marks: list[str], strength: float) -> dict[int, float]:
    """A bias to the tokens that end things."""
    ids = (tokenizer.encode(mark, add_special_tokens=False) for mark in (*MARKS, *marks))
    return {one[0]: strength for one in ids if len(one) == 1}


def marks_in(form: ToolFormat) -> list[str]:
    """A format's marks, as far as they can be tokens."""
    style = form.arguments
    found = {*form.begins, *form.inner, *form.call[1].split("\n")}
    if style is not None:
        found |= {style.end, style.quote, *style.marks}
    return sorted(mark.strip() for mark in found if len(mark.strip()) > 2 and "NAME" not in mark)


def with_marks(model: str, marks: list[str], folder: Path) -> str:
    """The model's shape and vocabulary in `folder`, with more tokens."""
    source = ModelFiles(EngineConfig(model=model)).path
    for file in source.glob("*.json"):
        shutil.copy(file, folder)
    tokens = json.loads((folder / "tokenizer.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    for mark in marks:
        tokens["added_tokens"].append({"id": config["vocab_size"], "content": mark, **plain})
        config["vocab_size"] += 1
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def run(
    bench: Bench, tokenizer: Tokenizer, cases: list[Case], marks: list[str], options: argparse.Namespace
) -> Counter[str]:
    """All cases, `--seeds` outputs each."""
    counts: Counter[str] = Counter()
    bias = fond_of(tokenizer, marks, options.fond)
    prompt = tokenizer.encode("Hello")
    texts: dict[str, list[int]] = {}
    for number, case in enumerate(cases):
        sampling = SamplingParams(
            temperature=1, seed=number, n=options.seeds, max_tokens=options.outputs, structured_outputs=case.wanted,
            logit_bias=bias, skip_special_tokens=False,
        )  # fmt: skip
        bench.engine.submit(Request(request_id=str(number), prompt_token_ids=prompt, sampling=sampling))
    left = {str(number): options.seeds for number in range(len(cases))}
    while left:
        for event in bench.events.get()[1]:
            case, place = cases[int(event.request_id)], f"{event.request_id}/{getattr(event, 'index', 0)}"
            if isinstance(event, Token):
                texts.setdefault(place, []).extend(event.token_ids)
            elif isinstance(event, Failed):
                counts["refused by name" if event.code == "unsupported" else f"failed: {event.code}"] += 1
                counts[f"refused: {event.message[:100]}"] += 1
                del left[event.request_id]
            elif isinstance(event, Finished):
                left[event.request_id] -= 1
                if not left[event.request_id]:
                    del left[event.request_id]
                ids = texts.pop(place, [])
                ids = ids[:-1] if ids and ids[-1] in tokenizer.eos_token_ids else ids
                _count(case, tokenizer.decode(ids, skip_special_tokens=False), event.reason, counts)
    return counts


def _count(case: Case, text: str, reason: str, counts: Counter[str]) -> None:
    if reason != "stop":
        counts["cut by their length"] += 1
        return
    counts["ended"] += 1
    try:
        case.check(text)
        counts["valid"] += 1
    except Exception as error:
        counts["INVALID"] += 1
        print(f"INVALID {case.name}: {text!r:.300}: {error!r:.300}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=["bfcl", "jsonschemabench"], default="bfcl")
    parser.add_argument("--format", choices=[*TOOL_FORMATS], default="hermes", help="of calls (default: hermes)")
    parser.add_argument("--model", default="skald", help="whose shape and vocabulary; the weights are random")
    parser.add_argument("--seeds", type=int, default=1, help="outputs of each request (default: 1)")
    parser.add_argument("--outputs", type=int, default=300, help="tokens of each at most (default: 300)")
    parser.add_argument("--fond", type=float, default=4.0, help="bias to the marks that end things (default: 4)")
    parser.add_argument("--marks", action="store_true", help="the format's marks are tokens of their own")
    parser.add_argument("--limit", type=int, help="so many requests at most, evenly out of all")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.set != "bfcl":
        refuse(parser, options, f"with --set {options.set}", "format", "marks")
    with tempfile.TemporaryDirectory() as folder:
        marks = marks_in(TOOL_FORMATS[options.format]) if options.marks else []
        work(with_marks(options.model, marks, Path(folder)) if marks else options.model, marks, options)


def work(model: str, marks: list[str], options: argparse.Namespace) -> None:
    """Print the counts."""
    config = EngineConfig(
        model=model, load_format="dummy", num_threads=options.threads, max_num_seqs=64, max_queue=4096
    )
    tokenizer = ModelFiles(config).tokenizer()
    assert tokenizer is not None
    counts: Counter[str] = Counter()
    found = bfcl(TOOL_FORMATS[options.format], counts) if options.set == "bfcl" else jsonschemabench(counts)
    cases = [*found]
    cases = cases[:: -(-len(cases) // options.limit)] if options.limit else cases
    bench = Bench(config)
    began = time.perf_counter()
    counts += run(bench, tokenizer, cases, marks, options)
    bench.engine.shutdown()
    print(f"{options.set}{f', {options.format}' if options.set == 'bfcl' else ''}: {time.perf_counter() - began:.0f} s")
    for name, count in sorted(counts.items(), key=lambda one: (one[0].startswith("refused:"), -one[1])):
        print(f"{count:7} {name}")


if __name__ == "__main__":
    main()
