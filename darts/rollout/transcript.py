"""What the requests of a candidate generated, as the answer that its agent loop would have given: `Transcript`.

Contract. An agent loop that is left in the middle gives no answer. Here is what it has, by its requests alone, whatever
the loop is: the first request's prompt, and behind it all that later prompts and responses add.

1. Only where each request's prompt goes on from the prompt and the response of the one before, which holds for loops
   that talk in turns. One that rewrites its context, or talks in several branches at once, has no such answer.
2. Generated tokens have mask 1 and the server's log-probs, others (a tool's answer) 0; the whole ends at the response
   budget, as verl's own loops cut it.
"""

import time
from dataclasses import dataclass, field
from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput
from verl.workers.rollout.replica import TokenOutput

from darts.rollout.client import OpenRequest

MEDIA_NAMES = {"image_data": "images", "video_data": "videos", "audio_data": "audios"}
"""The client's names of what a model with a processor takes -> verl's agent loops'."""


@dataclass(eq=False)
class Transcript:
    """The turns of one candidate."""

    prompt_ids: list[int] = field(default_factory=list)  # of the first request
    response_ids: list[int] = field(default_factory=list)  # all that came after it
    response_mask: list[int] = field(default_factory=list)
    log_probs: list[float] | None = None  # None: the servers give none
    num_turns: int = 0  # requests
    is_whole: bool = True  # each request went on from the one before
    _media: dict[str, Any] = field(default_factory=dict)  # of the last request
    _output: TokenOutput | None = None  # the last one
    _seconds: float = 0.0  # of all requests
    _first_fields: dict[str, Any] = field(default_factory=dict)  # `extra_fields` of the first

    def goes_on(self, request: OpenRequest) -> bool:
        """Whether a request's prompt begins with all that is here, as did those before."""
        known_ids = [*self.prompt_ids, *self.response_ids]
        return self.is_whole and request.prompt_ids[: len(known_ids)] == known_ids

    def add(self, request: OpenRequest, output: TokenOutput) -> None:
        """A turn has ended, or was stopped; one that was stopped before its first token adds nothing."""
        if self.num_turns and not output.token_ids:
            return
        if self.num_turns == 0:
            self.prompt_ids, self._first_fields = list(request.prompt_ids), output.extra_fields
            self.log_probs = None if output.log_probs is None else []
        self.is_whole &= self.goes_on(request) and (output.log_probs is None) == (self.log_probs is None)
        context_ids = request.prompt_ids[len(self.prompt_ids) + len(self.response_ids) :]
        self.response_ids += [*context_ids, *output.token_ids]
        self.response_mask += [0] * len(context_ids) + [1] * len(output.token_ids)
        if self.log_probs is not None and output.log_probs is not None:
            self.log_probs += [0.0] * len(context_ids) + list(output.log_probs)
        self.num_turns += 1
        self._media, self._output = request.media, output
        self._seconds += time.monotonic() - request.opened_at

    def answer(self, response_length: int) -> AgentLoopOutput:
        """The answer so far, as verl's `single_turn_agent` and `tool_agent` give theirs (0.9.1)."""
        output, media = self._output, self._media
        step = output.extra_fields.get("global_steps")
        extra_fields = {"min_global_steps": step, **self._first_fields, "max_global_steps": step}
        length = min(len(self.response_ids), response_length)
        return AgentLoopOutput(
            prompt_ids=self.prompt_ids,
            response_ids=self.response_ids[:length],
            response_mask=self.response_mask[:length],
            response_logprobs=None if self.log_probs is None else self.log_probs[:length],
            routed_experts=(
                None if output.routed_experts is None else output.routed_experts[: len(self.prompt_ids) + length]
            ),
            multi_modal_data={MEDIA_NAMES[name]: media[name] for name in MEDIA_NAMES if name in media},
            mm_processor_kwargs=media.get("mm_processor_kwargs"),
            num_turns=2 * self.num_turns,
            metrics=AgentLoopMetrics(
                generate_sequences=self._seconds,
                num_preempted=-1 if output.num_preempted is None else output.num_preempted,
            ),
            extra_fields={**extra_fields, "turn_scores": [], "tool_rewards": []},
        )
