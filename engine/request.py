"""What crosses from a client into an engine: a `Request` and its `SamplingParams`. Standard library only."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from kvasir.engine.errors import ClientError
from kvasir.engine.thoughts import Thoughts

MAX_WHOLE, MAX_ID = 2**31 - 1, 2**32 - 1
"""Of what has no other limit, and of a token: more doesn't fit into messages between processes."""
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 64
MAX_STOP_BYTES = 1024
MAX_BAD_WORDS = 1024
MAX_N = 128


@dataclass(frozen=True, kw_only=True)
class StructuredOutput:
    """What the output must look like: exactly one of the first six is set."""

    json: str | None = None
    """A JSON Schema: JSON text, or an object, which becomes text."""
    json_object: bool = False
    """Any JSON object."""
    regex: str | None = None
    choice: Sequence[str] = ()
    """One of these texts."""
    grammar: str | None = None
    """A context-free grammar: GBNF (llama.cpp), EBNF or Lark."""
    structural_tag: str | None = None
    """Tags between which a schema holds, outside of which text is free: JSON text, or an object, which becomes text."""
    disable_any_whitespace: bool = False
    """JSON is written without whitespace between its marks: of json, json_object and structural_tag."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "choice", _listed("choice", self.choice))
        for name in ("json", "structural_tag"):
            if isinstance(value := getattr(self, name), Mapping):
                object.__setattr__(self, name, _json_text(name, value))
        texts = [(name, getattr(self, name)) for name in ("json", "regex", "grammar", "structural_tag")]
        for name, text in [*texts, *(("choice", choice) for choice in self.choice)]:
            if text is not None and not isinstance(text, str):
                raise ClientError(f"{name} must be text, got {text!r:.60}", param="structured_outputs")
        _flag("json_object", self.json_object)
        _flag("disable_any_whitespace", self.disable_any_whitespace)
        kinds = ("json", "json_object", "regex", "choice", "grammar", "structural_tag")
        chosen = [name for name in kinds if getattr(self, name) not in (None, False, ())]
        if len(chosen) != 1:
            got = " and ".join(chosen) or "none"
            raise ClientError(
                f"structured output takes exactly one of {', '.join(kinds)}; got {got}", param="structured_outputs"
            )
        if self.disable_any_whitespace and chosen[0] in ("regex", "choice", "grammar"):
            text = (
                f"disable_any_whitespace is of json, json_object and structural_tag: a {chosen[0]} tells what there is"
            )
            raise ClientError(text, param="structured_outputs")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when to stop. Ranges are checked by construction; errors name field and range."""

    n: int = 1
    """Continuations of one prompt, 1 to 128. Continuation i draws with seed + i."""
    best_of: int | None = None
    """So many continuations are made, at least n, and the n best are delivered when all have ended: those with the highest
    log probability per token, or of `use_beam_search` with the highest score. None: n."""
    use_beam_search: bool = False
    """Keep the best_of likeliest continuations at each token instead of drawing one: temperature, seed and what else shapes
    draws mean nothing."""
    length_penalty: float = 1.0
    """Beams are compared by log probability / length ** length_penalty."""
    early_stopping: Literal["no", "yes", "never"] | bool = "no"
    """The search ends when best_of continuations have ended ("yes", or True), or when one isn't likely to get better ("no"),
    or can't ("never")."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """0: the likeliest token alone."""
    top_k: int = 0
    """0 or -1: off."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    repeat_last_n: int = -1
    """How many of the newest tokens the three penalties look at; -1: all, 0: none."""
    penalize_newline: bool = True
    """False: the three penalties leave line breaks alone."""
    typical_p: float = 1.0
    """Only the tokens whose surprise is nearest to the expected one, up to this sum of probabilities."""
    tfs_z: float = 1.0
    """Tail-free sampling: below 1, the smaller the shorter the tail."""
    mirostat: int = 0
    """1 or 2: a version of Mirostat keeps the surprise of the output near `mirostat_tau`."""
    mirostat_tau: float = 5.0
    """Bits per token."""
    mirostat_eta: float = 0.1
    """How fast it corrects itself."""
    bad_words: Sequence[str] = ()
    """Texts that aren't written: the last token that would complete one is never chosen."""
    allowed_token_ids: Sequence[int] = ()
    """No other tokens are chosen; empty: all may be."""
    logits_processors: Mapping[str, Any] = field(default_factory=dict)
    """Name of one that is installed and enabled -> its arguments, a JSON object (kept as JSON text)."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id -> value added to its logit, -100 to 100."""
    seed: int | None = None
    """None: the engine picks one; it is then reported nowhere and differs between requests."""
    stop: Sequence[str] = ()
    """Strings that end the output; none of their characters is delivered. A single string is accepted."""
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    min_tokens: int = 0
    """No end-of-sequence and no stop before this many tokens."""
    max_tokens: int | None = 16
    """None: up to the end of the model's context."""
    ignore_eos: bool = False
    deterministic: bool = False
    """Refuse the request where the batch, chunks or the cache might change a bit of its logits (see --deterministic)."""
    logprobs: int | None = None
    """None: off. 0 to 20: that many most likely tokens, besides the sampled one."""
    prompt_logprobs: int | None = None
    """The same for each prompt token but the first."""
    prompt_logprob_start: int = 0
    """Prompt tokens before this one aren't needed with their log probability: those that are cached have none."""
    truncate_prompt_tokens: int | None = None
    """A longer prompt is cut to so many tokens, -1: to what fits, instead of being refused; the cut is reported."""
    truncation_side: Literal["left", "right"] = "left"
    """Where tokens are cut off."""
    num_keep: int = 0
    """So many tokens at the head of the prompt are kept when its left is cut; -1: all, so that it isn't cut."""
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    detokenize: bool = True
    structured_outputs: StructuredOutput | None = None
    thoughts: Thoughts | None = None
    """How the output's thoughts are told from the answer, for which alone `structured_outputs` holds."""

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids", "bad_words", "allowed_token_ids"):
            object.__setattr__(self, name, _listed(name, getattr(self, name)))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias or {}))
        if self.logits_processors:
            object.__setattr__(self, "logits_processors", _as_text(self.logits_processors))
        if isinstance(self.early_stopping, bool):
            object.__setattr__(self, "early_stopping", "yes" if self.early_stopping else "no")
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        self._check()

    @classmethod
    def from_optional(cls, **given: Any) -> SamplingParams:
        """Of what isn't None."""
        return cls(**{name: value for name, value in given.items() if value is not None})

    @property
    def continuations(self) -> int:
        """How many are made: of those n are delivered."""
        return self.n if self.best_of is None else self.best_of

    @property
    def streams(self) -> int:
        """How many the engine sends events of: a beam search sends the n best, and otherwise `Transcript` chooses."""
        return self.n if self.use_beam_search else self.continuations

    def _check(self) -> None:
        for name in FLAGS:
            _flag(name, getattr(self, name))
        for name, kind in NESTED.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise ClientError(f"{name} must be a {kind.__name__}, got {value!r:.60}", param=name)
        _whole("n", self.n, 1, MAX_N)
        if self.best_of is not None:
            _whole("best_of", self.best_of, self.n, MAX_N, note=f" (n is {self.n})")
        _real("length_penalty", self.length_penalty, -math.inf, math.inf)
        if self.early_stopping not in ("no", "yes", "never"):
            text = f'early_stopping must be true, false or "never", got {self.early_stopping!r:.60}'
            raise ClientError(text, param="early_stopping")
        _real("temperature", self.temperature, 0.0, math.inf)
        _real("top_p", self.top_p, 0.0, 1.0)
        _whole("top_k", self.top_k, 0, note="; 0 or -1 turns it off")
        _real("min_p", self.min_p, 0.0, 1.0)
        _real("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _real("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _real("repetition_penalty", self.repetition_penalty, 0.0, math.inf, open_low=True)
        _whole("repeat_last_n", self.repeat_last_n, -1, note="; -1 looks at all tokens")
        _real("typical_p", self.typical_p, 0.0, 1.0, open_low=True)
        _real("tfs_z", self.tfs_z, 0.0, 1.0, open_low=True)
        _whole("mirostat", self.mirostat, 0, 2)
        _real("mirostat_tau", self.mirostat_tau, 0.0, math.inf)
        _real("mirostat_eta", self.mirostat_eta, 0.0, 1.0)
        if self.truncate_prompt_tokens not in (None, -1):
            _whole("truncate_prompt_tokens", self.truncate_prompt_tokens, 1, note="; -1 cuts to what fits")
        if self.truncation_side not in ("left", "right"):
            text = f'truncation_side must be "left" or "right", got {self.truncation_side!r:.60}'
            raise ClientError(text, param="truncation_side")
        _whole("num_keep", self.num_keep, -1, note="; -1 keeps all")
        _check_texts("bad_words", self.bad_words, MAX_BAD_WORDS)
        for token in self.allowed_token_ids:
            _whole("allowed_token_ids", token, 0, MAX_ID)
        for token, bias in self.logit_bias.items():
            _whole("logit_bias key", token, 0, MAX_ID)
            _real("logit_bias value", bias, -100.0, 100.0)
        if self.seed is not None:
            _whole("seed", self.seed, -(2**63), 2**63 - 1)
        _check_texts("stop", self.stop, MAX_STOP_STRINGS)
        for token in self.stop_token_ids:
            _whole("stop_token_ids", token, 0, MAX_ID)
        _whole("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 1)
            if self.min_tokens > self.max_tokens:
                raise ClientError(
                    f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})", param="min_tokens"
                )
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 0, MAX_LOGPROBS)
        _whole("prompt_logprob_start", self.prompt_logprob_start, 0)
        if self.stop and not self.detokenize:
            raise ClientError("stop strings need detokenize=True; use stop_token_ids instead", param="stop")


NESTED: Mapping[str, type[StructuredOutput | Thoughts]] = {
    "structured_outputs": StructuredOutput,
    "thoughts": Thoughts,
}
"""Fields of SamplingParams that have fields of their own."""
FLAGS = tuple(name for name, kind in SamplingParams.__annotations__.items() if kind == "bool")


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolingParams:
    """What is wanted instead of tokens: one vector for the prompt."""

    task: Literal["embed", "classify", "score"] = "embed"
    """embed: a vector; classify: a number per label; score: how well a pair of texts fits, one number."""
    dimensions: int | None = None
    """Only the first so many, normalised again (Matryoshka, Kusupati et al. 2022, arXiv:2205.13147)."""
    normalize: bool | None = None
    """Scale vectors to length 1, or turn labels' logits into probabilities; None: as the model's files say."""

    def __post_init__(self) -> None:
        if self.dimensions is not None:
            _whole("dimensions", self.dimensions, 1)


@dataclass(frozen=True, slots=True)
class Peer:
    """Another group that is believed to hold the head of a prompt: its blocks may be fetched instead of computed."""

    address: str
    """Where it serves blocks: HOST:PORT."""
    secret: str = field(repr=False)
    """What it is shown."""
    tokens: int
    """So many leading tokens it is believed to hold."""
    ordered: bool = False
    """Fetch from it without weighing that against computing: it computed the prompt for this request."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt for one model. The engine answers with `Event`s that carry `request_id`."""

    request_id: str
    prompt_token_ids: Sequence[int]
    sampling: SamplingParams
    priority: int = 0
    """Lower is served first, as in vLLM."""
    cache_salt: str = ""
    """Blocks are shared only between requests with the same salt."""
    deadline_s: float | None = None
    """Seconds from submission until the request fails with `DeadlineError`."""
    adapter: str | None = None
    trace_context: Mapping[str, str] = field(default_factory=dict)
    """W3C headers (traceparent, tracestate) of the span that sent this."""
    pooling: PoolingParams | None = None
    """Set: the request ends with `Pooled` once its prompt is computed, and `sampling` means nothing."""
    token_type_ids: Sequence[int] = ()
    """Segment of each prompt token, for encoders that read pairs; empty: all 0."""
    resume_token_ids: Sequence[int] = ()
    """Tokens already delivered by another group: the sequence goes on behind them (n must be 1)."""
    peers: tuple[Peer, ...] = ()
    """Who may have the prompt's blocks, the best first. A hint: the answer is the same without."""
    truncated_tokens: int = 0
    """How many tokens of the prompt were left out before it came here: for reports alone."""


def _whole(name: str, value: object, low: int, high: int = MAX_WHOLE, note: str = "") -> None:
    """Raise unless `value` is an int (bool is not) in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        text = f"{name} must be an integer from {low} to {high}{note}, got {value!r:.60}"
        raise ClientError(text, param=name.split()[0])


def _flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ClientError(f"{name} must be true or false, got {value!r:.60}", param=name)


def _listed(name: str, value: Any) -> tuple[Any, ...]:
    """A text alone is a list of one, not of its letters; None: nothing."""
    if isinstance(value, str):
        return (value,)
    try:
        return () if value is None else tuple(value)
    except TypeError as error:
        raise ClientError(f"{name} must be a list, got {value!r:.60}", param=name) from error


def _json_text(name: str, value: object) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise ClientError(f"{name} must be JSON: {error}", param="structured_outputs") from error


def _as_text(processors: object) -> dict[str, str]:
    """Name -> arguments as JSON text. Raises unless they are JSON objects."""
    if not isinstance(processors, Mapping):
        raise ClientError(
            f"logits_processors must map names to arguments, got {processors!r:.60}", param="logits_processors"
        )
    try:
        given = {str(k): json.loads(v) if isinstance(v, str) else v for k, v in processors.items()}
        found = {name: json.dumps(arguments or {}, sort_keys=True) for name, arguments in given.items()}
    except (TypeError, ValueError, RecursionError) as error:
        raise ClientError(f"logits_processors: arguments must be JSON: {error}", param="logits_processors") from error
    if wrong := [name for name, text in found.items() if not text.startswith("{")]:
        raise ClientError(f"logits_processors: arguments of {wrong[0]!r} must be an object", param="logits_processors")
    return found


def _check_texts(name: str, texts: Sequence[object], most: int) -> None:
    """Raise unless `texts` are at most `most` strings of 1 to MAX_STOP_BYTES bytes."""
    if len(texts) > most:
        raise ClientError(f"{name} has {len(texts)} strings; at most {most}", param=name)
    for text in texts:
        if not isinstance(text, str) or not 0 < len(text.encode(errors="replace")) <= MAX_STOP_BYTES:
            limits = f"1 to {MAX_STOP_BYTES} bytes long"
            raise ClientError(f"{name} strings must be {limits}, got {text!r:.40}", param=name)


def _real(name: str, value: object, low: float, high: float, open_low: bool = False) -> None:
    """Raise unless `value` is a finite number in [low, high], or (low, high] with `open_low`."""
    below = "above" if open_low else "at least"
    limits = f"a number {below} {low:g}" + ("" if high == math.inf else f" and at most {high:g}")
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not low <= float(value) <= high or (open_low and float(value) == low):  # type: ignore[arg-type]
        raise ClientError(f"{name} must be {limits}, got {value!r:.60}", param=name.split()[0])
