"""The messages between members and coordinator: what is sent is read back, and anything else is refused."""

import contextlib

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geopetals.coordinator import messages as m
from geopetals.coordinator.codec import Message

PROFILE = m.Profile(
    device="cpu", dtype="float32", quantization=None, block_bytes=10, kv_bytes_per_token=2, memory_bytes=1000,
    decode=(m.DecodeSample(1, 16, 0.001), m.DecodeSample(8, 16, 0.002)), prefill=(m.PrefillSample(32, 0.01),),
    overhead_s=0.001,
)  # fmt: skip
CHAIN = (m.ChainHop("a", 0, 3), m.ChainHop("b", 3, 8))
PREDICTED = m.Predicted(ttft_s=0.5, tpot_s=0.1, end_to_end_s=3.0, wait_s=0.0)
LINKS = (m.LinkSample("a", 0.01, False), m.LinkSample("b", 0.25, True))
EXAMPLES: tuple[Message, ...] = (
    m.Hello(version=1, role="server", token="gpc1"),
    m.Welcome(
        certificate=b"c", trust=b"t", trust_version=3, swarm="s", model="m", identity={"model": "m", "revision": None},
        open=False, heartbeat_s=2.0, now=1e9, standby=b"x",
    ),
    m.Register(
        profile=PROFILE, limits=m.Limits(pin=m.Span(0, 4), memory_bytes=900), held=None, epoch=0, name="one",
        addresses=("/ip4/127.0.0.1/tcp/1",), relayed=False, wire=1,
    ),
    m.Registered(epoch=2, span=m.Span(0, 4), reason="covers blocks 0:4", probe=("a",)),
    m.Report(
        epoch=2, state="ready", span=m.Span(0, 4), cache=m.CacheUse(total=100, free=20, running=1, waiting=0),
        sessions=(m.SessionUse("s", 80, 5),), links=LINKS, rates=(m.RateSample("p", 2e6),), load_s=1.5, bytes_loaded=40,
    ),
    m.Reported(trust_version=1, trust=b"t", known=False),
    m.Assign(epoch=3, span=None, reason="not needed", drain_s=30.0),
    m.Assigned(accepted=False, why="epoch 3 is older than 4"),
    m.Open(session_id="s", batch=1, max_length=64, prompt_tokens=8, output_tokens=None, links=LINKS),
    m.Opened(status="admitted", ticket=b"t", chain=CHAIN, predicted=PREDICTED),
    m.Opened(status="queued", position=2, start_in_s=1.5),
    m.Admitted(session_id="s", ticket=b"t", chain=CHAIN, predicted=PREDICTED),
    m.Queued(session_id="s", position=1, start_in_s=2.0),
    m.Refused(session_id="s", why="busy", retry_after_s=3.0),
    m.Extend(session_id="s", max_length=128),
    m.Extended(ticket=b"t"),
    m.Close(session_id="s", measured=m.Measured(ttft_s=0.1, tpot_s=None, tokens=1)),
    m.Resume(sessions=(m.RunningSession(session_id="s", ticket=b"t", chain=CHAIN, tokens_used=12),), held=("s", "t")),
    m.Links(links=LINKS),
    m.LinksTaken(trust_version=1, probe=("b",)),
    m.Cancel(session_id="s"),
    m.Done(),
)  # fmt: skip
NASTY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_message_survives_the_wire(message: Message) -> None:
    sent = msgpack.unpackb(msgpack.packb(message.to_dict()))
    assert type(message).from_dict(sent) == message


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_newer_member_may_say_more(message: Message) -> None:
    assert type(message).from_dict(message.to_dict() | {"from_the_future": 1}) == message


@settings(max_examples=200, deadline=None)
@given(example=st.sampled_from(EXAMPLES), data=st.data(), value=NASTY)
def test_a_message_of_other_values_is_read_as_itself_or_refused(
    example: Message, data: st.DataObject, value: object
) -> None:
    plain = example.to_dict()
    if plain:
        plain[data.draw(st.sampled_from(sorted(plain)))] = value
    with contextlib.suppress(m.MessageError):
        read = type(example).from_dict(plain)
        assert type(example).from_dict(read.to_dict()) == read


@pytest.mark.parametrize("raw", [None, [], 3, "x", {}, {"session_id": "s"}])
def test_what_is_no_map_or_lacks_a_field_is_refused(raw: object) -> None:
    with pytest.raises(m.MessageError):
        m.Extend.from_dict(raw)


@pytest.mark.parametrize(
    "change",
    [{"batch": 0}, {"max_length": 0}, {"max_length": 2**40}, {"session_id": ""}, {"session_id": "s" * 200},
     {"prompt_tokens": -1}, {"links": [["a", float("nan"), False]]}, {"links": [["a", 0.1]]}],
)  # fmt: skip
def test_sessions_of_impossible_sizes_are_refused(change: dict[str, object]) -> None:
    good = m.Open(session_id="s", batch=1, max_length=64, prompt_tokens=8).to_dict()
    with pytest.raises(m.MessageError):
        m.Open.from_dict(good | change)
