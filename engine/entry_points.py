"""What users of vLLM's `LLM` know besides: beam search, `encode`, and by name what isn't there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, NoReturn, cast

from kvasir.engine.errors import ClientError, UnsupportedError
from kvasir.engine.output import Logprob, RequestOutput
from kvasir.engine.request import PoolingParams, SamplingParams

if TYPE_CHECKING:
    from kvasir.engine.llm import Prompt

REFUSED: Mapping[str, str] = {
    "sleep": "end the process instead; with --kv-disk-path its cached prefixes outlive it",
    "wake_up": "there is no sleep",
    "reward": "use classify(prompts, PoolingParams(task='classify', normalize=False))",
    "apply_model": "the model runs in processes of its own",
    "collective_rpc": "ranks run steps, nothing else",
    "get_metrics": "engine.stats() has the counts",
    "reset_prefix_cache": "give requests a cache_salt of their own",
    "reset_mm_cache": "there is no vision yet",
    "start_profile": "use torch's profiler around generate",
    "stop_profile": "use torch's profiler around generate",
    "enqueue": "AsyncLLM takes requests one by one",
    "wait_for_completion": "AsyncLLM takes requests one by one",
    "init_weight_transfer_engine": "weights are loaded once",
    "update_weights": "weights are loaded once",
}
"""Name of a method of vLLM's `LLM` -> what to do instead."""


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """As vLLM has it. Ranges are those of SamplingParams."""

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    """Beams aren't drawn: 0."""
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False

    def sampling(self) -> SamplingParams:
        """The same search."""
        if self.temperature != 0:
            text = f"temperature of a beam search must be 0, got {self.temperature!r:.60}: beams aren't drawn"
            raise UnsupportedError(text, param="temperature")
        return SamplingParams(
            use_beam_search=True,
            n=self.beam_width,
            best_of=self.beam_width,
            max_tokens=self.max_tokens,
            ignore_eos=self.ignore_eos,
            length_penalty=self.length_penalty,
            include_stop_str_in_output=self.include_stop_str_in_output,
            logprobs=0,
        )


@dataclass(frozen=True, slots=True)
class BeamSearchSequence:
    """One beam. `tokens` and `text` begin with the prompt's."""

    tokens: list[int]
    logprobs: list[dict[int, Logprob]]
    """Of the tokens behind the prompt."""
    cum_logprob: float
    text: str | None
    finish_reason: str | None
    stop_reason: str | int | None


@dataclass(frozen=True, slots=True)
class BeamSearchOutput:
    """A prompt's beams, best first."""

    sequences: list[BeamSearchSequence]


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several: a list of ids is one."""
    if isinstance(prompts, (str, Mapping)) or (len(prompts) > 0 and isinstance(prompts[0], Integral)):
        return [cast("Prompt", prompts)]
    return list(cast("Sequence[Prompt]", prompts))


class EntryPoints:
    """Methods of `LLM` in terms of others."""

    if TYPE_CHECKING:
        generate: Callable[..., list[RequestOutput]]
        embed: Callable[..., Any]
        classify: Callable[..., Any]
        get_tokenizer: Callable[[], Any]

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        *,
        use_tqdm: bool = False,
        concurrency_limit: int | None = None,
    ) -> list[BeamSearchOutput]:
        """The likeliest continuations of each prompt as a whole; `concurrency_limit`: so many prompts at a time."""
        sampling, asked = params.sampling(), as_list(prompts)
        limit = max(1, len(asked)) if concurrency_limit is None else concurrency_limit
        if limit < 1:
            raise ClientError(f"concurrency_limit must be at least 1, got {limit}", param="concurrency_limit")
        parts = [asked[at : at + limit] for at in range(0, len(asked), limit)]
        return [self._beams(one) for part in parts for one in self.generate(part, sampling, use_tqdm=use_tqdm)]

    def encode(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | None = None,
        *,
        pooling_task: str | None = None,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool = True,
    ) -> Any:
        """`embed` or `classify`, by the task."""
        task = pooling_task or (pooling_params.task if pooling_params else "embed")
        if task not in ("embed", "classify"):
            text = f"encode makes a vector (embed) or labels (classify) of a prompt, got {task!r:.60}"
            raise UnsupportedError(text, param="pooling_task")
        params = pooling_params or PoolingParams(task="embed" if task == "embed" else "classify")
        method = self.embed if task == "embed" else self.classify
        return method(prompts, params, truncate_prompt_tokens=truncate_prompt_tokens, use_tqdm=use_tqdm)

    if not TYPE_CHECKING:  # a type checker knows the methods that there are, and no others

        def __getattr__(self, name: str) -> Callable[..., NoReturn]:
            if name not in REFUSED:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

            def refused(*_: Any, **__: Any) -> NoReturn:
                raise UnsupportedError(f"LLM.{name} isn't supported: {REFUSED[name]}", param=name)

            return refused

    def _beams(self, output: RequestOutput) -> BeamSearchOutput:
        tokenizer = self.get_tokenizer()
        head = output.prompt
        if head is None and tokenizer is not None:
            head = tokenizer.decode(output.prompt_token_ids, skip_special_tokens=True)
        return BeamSearchOutput(
            [
                BeamSearchSequence(
                    tokens=[*output.prompt_token_ids, *one.token_ids],
                    logprobs=list(one.logprobs or ()),
                    cum_logprob=one.cumulative_logprob or 0.0,
                    text=None if head is None else head + one.text,
                    finish_reason=one.finish_reason,
                    stop_reason=one.stop_reason,
                )
                for one in output.outputs
            ]
        )
