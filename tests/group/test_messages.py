"""Every message arrives as it was sent, and a change of one is a change of the protocol's version."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields

import numpy as np
import pytest

from podquant.checkpoint.fingerprint import Fingerprint
from podquant.engine.backend import EngineStats
from podquant.engine.limits import Limits
from podquant.engine.options import EngineOptions
from podquant.engine.request import FinishReason, Output, SamplingParams, TokenLogprobs
from podquant.group import messages
from podquant.group.codec import Codec, encode
from podquant.group.fingerprint import Fingerprints
from podquant.group.launch import Deadlines, Launch, Member, new_nonce
from podquant.group.messages import VERSION

ENTRY = TokenLogprobs(3, -0.1, ((3, -0.1), (4, -2.30258509299)))
OUTPUTS = (
    Output("id", (1,), "é", (ENTRY,)),
    Output("id", (), "", (), (None, ENTRY), FinishReason.STOP, "stop", None),
    Output("id", (2,), finish_reason=FinishReason.STOP, stop_reason=2),
    Output("id", finish_reason=FinishReason.ERROR, error="lost"),
)
LAUNCH = Launch(
    Member(1, 2, 4), 7, new_nonce(), EngineOptions("m", tp_size=4), Deadlines(liveness=2.5), "h", "h:1", "h:2"
)
STATS = EngineStats(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11)
PARAMS = SamplingParams(
    max_tokens=7,
    min_tokens=1,
    temperature=0.3,
    top_p=0.9,
    top_k=5,
    min_p=0.1,
    repetition_penalty=1.1,
    presence_penalty=0.2,
    frequency_penalty=-0.3,
    seed=42,
    stop=("a", "ü"),
    stop_token_ids=(3, 4),
    ignore_eos=True,
    logprobs=2,
    prompt_logprobs=0,
)
EXAMPLES = (
    messages.Heartbeat(),
    messages.Welcome(),
    messages.Refusal("why", is_final=True),
    messages.Start(LAUNCH, "00ff"),
    messages.Abort("id"),
    messages.Stop(1.5),
    messages.Listening("h:1", "h:2"),
    messages.Loading(1, 1 << 40),
    messages.Ready(),
    messages.EngineReady(Limits(1, 2, 3, 4, 5, 6, True), STATS, Fingerprints(Fingerprint("w", "samples"), "c", "k")),
    messages.MemberHeartbeat(0.25, STATS),
    messages.MemberHeartbeat(0.0, None),
    messages.Outputs(OUTPUTS),
    messages.Failed("ConfigError", "text"),
    messages.Ended("by itself"),
    messages.HostHello(3, {"nnodes": 4, "dtype": "auto", "mem_fraction_static": 0.5, "context_length": None}),
    *(messages.Report(Member(0, 1, 2), 5, each) for each in (messages.Outputs(OUTPUTS), messages.Ended("gone"))),
    messages.StartMember(LAUNCH),
    *(messages.CommandMember(0, 5, each) for each in (messages.Abort("id"), messages.Stop(0.0))),
    messages.EndMember(1),
    messages.Shutdown(),
    messages.RankHello(1, Fingerprints(Fingerprint("w", "samples"), "c", "k")),
    messages.EndOfSteps(),
)
CODECS: dict[str, Codec[object]] = {name: each for name, each in vars(messages).items() if isinstance(each, Codec)}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda each: type(each).__name__)
def test_a_message_arrives_as_it_was_sent(example: object) -> None:
    name = type(example).__name__
    carriers = [codec for codec in CODECS.values() if name in codec.kinds]
    assert carriers
    for codec in carriers:
        assert codec.decode(encode(example)) == example


def test_a_step_arrives_with_its_arrays() -> None:
    ints = np.arange(6, dtype=np.int32).reshape(2, 3)
    step = messages.TO_RANK.decode(encode(messages.Step(1, 2, False, (ints,))))
    assert isinstance(step, messages.Step)
    assert (step.number, step.num_tokens, step.scores) == (1, 2, False)
    assert step.arrays[0].tolist() == ints.tolist()


def test_a_request_arrives_with_its_prompt() -> None:
    submit = messages.Submit("id", np.array([1, 2], np.int32), PARAMS, "salt")
    for codec, message in ((messages.TO_MEMBER, submit), (messages.TO_HOST, messages.CommandMember(0, 5, submit))):
        found = codec.decode(encode(message))
        found = found.command if isinstance(found, messages.CommandMember) else found
        assert isinstance(found, messages.Submit)
        assert (found.request_id, found.prompt.tolist(), found.params, found.cache_salt) == (
            "id",
            [1, 2],
            PARAMS,
            "salt",
        )


def test_there_is_an_example_of_every_message() -> None:
    kinds = {kind for codec in CODECS.values() for kind in codec.kinds}
    assert kinds == {type(example).__name__ for example in EXAMPLES} | {"Step", "Submit"}


def test_a_change_of_messages_is_a_change_of_version() -> None:
    """After a change raise `messages.VERSION`, then put the digest found here beside it."""
    kinds = {kind for codec in CODECS.values() for kind in codec.kinds.values()}
    described = [
        [kind.__name__, [[field.name, str(field.type)] for field in fields(kind)]]  # type: ignore[arg-type]
        for kind in sorted({*kinds, Launch, Member, Deadlines}, key=lambda kind: kind.__name__)
    ]
    digest = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:12]
    assert (VERSION, digest) == (4, "6ab98641c114")
