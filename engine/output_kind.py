"""What a stream's consumer gets each time something is new: everything so far, what is new, or all at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from kvasir.engine.errors import ClientError
from kvasir.engine.output import CompletionOutput, Logprob, RequestOutput, named_logprobs, request_output
from kvasir.engine.tokenizer import Tokenizer
from kvasir.engine.transcript import Delta, Transcript

OutputKind = Literal["cumulative", "delta", "final_only"]
KINDS = ("cumulative", "delta", "final_only")


class OutputWriter:
    """Of one request. What was put into words once isn't again: a step costs what is new (and a copy of its lists)."""

    def __init__(
        self, transcript: Transcript, prompt: str | None, tokenizer: Tokenizer | None, kind: OutputKind
    ) -> None:
        if kind not in KINDS:
            raise ClientError(f"output_kind must be {', '.join(KINDS)}; got {kind!r:.60}", param="output_kind")
        self._transcript, self._tokenizer, self._kind = transcript, tokenizer, kind
        self._head = request_output(transcript, prompt, tokenizer)
        self._said = {output.index: output for output in self._head.outputs}
        self._prompt_told = False

    def write(self, deltas: Sequence[Delta]) -> RequestOutput | None:
        """None: nothing is due yet."""
        transcript = self._transcript
        if self._kind == "final_only":
            done = transcript.finished
            return request_output(transcript, self._head.prompt, self._tokenizer) if done else None
        news = [self._completion(delta) for delta in deltas]
        if not self._prompt_told and transcript.prompt_logprobs is not None:
            self._head, self._prompt_told = self._with_scores(), True
        found = news
        if self._kind == "cumulative":
            for new in news:
                self._said[new.index] = _joined(self._said[new.index], new)
            found = list(self._said.values())
        head = self._head
        if self._kind == "delta" and self._prompt_told:
            self._head = replace(head, prompt_logprobs=None)
        cached, timing = transcript.cached_tokens, transcript.outputs[0].timing
        return replace(head, outputs=found, finished=transcript.finished, num_cached_tokens=cached, metrics=timing)

    def _with_scores(self) -> RequestOutput:
        whole = request_output(self._transcript, self._head.prompt, self._tokenizer)
        return replace(self._head, prompt_logprobs=whole.prompt_logprobs)

    def _completion(self, delta: Delta) -> CompletionOutput:
        """What is new in one continuation."""
        named: list[dict[int, Logprob]] | None = None
        if delta.logprobs is not None:
            named = named_logprobs(delta.token_ids, delta.logprobs, self._tokenizer)
        return CompletionOutput(
            index=delta.index,
            text=delta.text,
            token_ids=list(delta.token_ids),
            cumulative_logprob=None if delta.logprobs is None else sum(score.logprob for score in delta.logprobs),
            logprobs=named,
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
        )


def _joined(before: CompletionOutput, new: CompletionOutput) -> CompletionOutput:
    total, logprobs = before.cumulative_logprob, before.logprobs
    if new.logprobs is not None and new.cumulative_logprob is not None:
        total, logprobs = (total or 0.0) + new.cumulative_logprob, [*(logprobs or ()), *new.logprobs]
    return replace(
        new,
        text=before.text + new.text,
        token_ids=[*before.token_ids, *new.token_ids],
        cumulative_logprob=total,
        logprobs=logprobs,
    )
