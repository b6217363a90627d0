"""What a hostile peer says: honest messages with something wrong in them, drawn from a seed."""

import math
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from hivemind.proto import runtime_pb2
from hivemind.proto.p2pd_pb2 import RPCError

from geopetals.swarm.ring_messages import KEY, PUSH_STREAM, NextHop, Opening, Step, Want, hello
from geopetals.swarm.stack import DUMMY, DUMMY_INT64, pack_args_kwargs
from geopetals.swarm.wire import HANDLER, end_of_stream, frame, serialize, write_metadata

Request = runtime_pb2.ExpertRequest
ODD_NUMBERS = [-1, 0, 1, 2, 2**31, 2**40, 2**63, -(2**63), True, 1.5, math.nan, math.inf, -math.inf]
ODD_VALUES: list[Any] = [*ODD_NUMBERS, None, "", "x" * 3000, "../../etc", b"\xff" * 50, [], {}, [[]] * 20, [None, {}]]
ODD_SIZES = [0, 1, 2, 3, 63, 64, 65, 1024, 2**16, 2**27, 2**31, 2**32 - 1]
ODD_DTYPES = ["", "object", "float64", "int8", "bool", "float16", "bfloat16", "int64", "torch.float32", "f" * 2000]
OVER = [end_of_stream()] * 2
STREAMS = [
    f"{HANDLER}.rpc_inference",
    PUSH_STREAM,
    f"{HANDLER}.rpc_forward_stream",
    f"{HANDLER}.rpc_backward_stream",
]
CALLS = ["rpc_info", "rpc_push", "rpc_forward", "rpc_backward"]


@dataclass(frozen=True)
class Conversation:
    """What is written on one stream, message by message. `waits`: the end is said properly and answers are read."""

    stream: str
    messages: list[bytes]
    waits: bool = True


class Hostile:
    """`names` are ids of other people's sessions, the newest last, which nobody but they should know."""

    def __init__(
        self, seed: int, *, swarm: str, blocks: range, hidden: int, names: list[str], peers: list[str]
    ) -> None:
        self.random = random.Random(seed)
        self._swarm, self._blocks, self._hidden = swarm, blocks, hidden
        self._names, self._peers = names, peers
        self._numbers = 0

    def conversation(self) -> Conversation:
        kinds: list[Callable[[], Conversation]] = [
            self._noise,
            self._bad_frames,
            self._petals,
            self._petals,
            self._ring,
            self._ring,
            self._ring,
            self._push,
            self._pass,
        ]
        return self.random.choice(kinds)()

    def call(self) -> tuple[str, bytes]:
        """A unary call: its name, and the bytes of the request."""
        name = self.random.choice(CALLS)
        if self.random.random() < 0.1:
            return name, self.random.randbytes(self.random.randrange(200))
        if name == "rpc_info":
            return name, runtime_pb2.ExpertUID(uid=self._uid()).SerializeToString()
        request = self._session_step({"session_id": self._name()}) if name == "rpc_push" else self._pass_request(name)
        return name, self._maybe_flipped(request.SerializeToString())

    # -- streams -------------------------------------------------------------------------------------------------------

    def _noise(self) -> Conversation:
        data = [self.random.randbytes(self.random.randrange(1, 300)) for _ in range(self.random.randrange(1, 4))]
        return Conversation(self.random.choice(STREAMS), data, waits=False)

    def _bad_frames(self) -> Conversation:
        good = frame(self._opening({}))
        bad = [
            b"\x00" + struct.pack(">Q", self.random.choice([2**28 + 1, 2**40, 2**63, 2**64 - 1])),
            b"\x07" + good[1:],
            good[: self.random.randrange(1, len(good))],
            b"\x01"
            + struct.pack(">Q", 500)
            + RPCError(message="ServerFull: " + "no\n" * 200).SerializeToString()[:500],
            b"\x00" + struct.pack(">Q", 0),
            frame(Request(tensors=[runtime_pb2.Tensor()] * 40_000)),
            frame(Request(uid=" ".join(["x.1"] * 20_000), metadata=write_metadata({"max_length": 8}))),
            frame(Request(uid=self._uid(), metadata=nested(self.random.choice([30, 300, 3000])))),
            frame(Request(uid=self._uid(), metadata=write_metadata({"max_length": 8, "x": "y" * 200_000}))),
        ]
        picked = self.random.sample(bad, 2)
        return Conversation(self.random.choice(STREAMS), picked, waits=False)

    def _petals(self) -> Conversation:
        first = self._opening({"next_servers": self._next_servers()} if self.random.random() < 0.3 else {})
        messages = [self._maybe_flipped_frame(first)]
        messages += [frame(self._session_step({})) for _ in range(self.random.randrange(4))]
        return Conversation(STREAMS[0], messages, waits=self.random.random() < 0.8)

    def _ring(self) -> Conversation:
        raw = Opening(
            heartbeat_s=self.random.choice([0.1, 0.5, 60.0]),
            is_last=self.random.random() < 0.6,
            next_hop=self._next_hop(),
            previous=self.random.choice([None, *self._peers]),
            trace=self.random.random() < 0.3,
            credential=self.random.choice([b"", b"x" * 100]),
        ).to_dict()
        if self.random.random() < 0.3:
            raw[self.random.choice(list(raw))] = self._odd()
        messages = [frame(self._opening({KEY: raw}, tokens=0, odd=self.random.random() < 0.2))]
        position = 0
        for number in range(self.random.randrange(1, 6)):
            request, tokens = self._ring_step(number, position)
            position += tokens
            messages.append(self._maybe_flipped_frame(request))
        messages += [frame(Request(metadata=write_metadata({"beat": []})))] * self.random.choice([0, 0, 1, 50])
        return Conversation(STREAMS[0], messages, waits=self.random.random() < 0.8)

    def _push(self) -> Conversation:
        """Into somebody else's session, mostly."""
        first = Request(metadata=hello(self._name()))
        if self.random.random() < 0.3:
            first = Request(metadata=write_metadata({"session_id": self._odd()}))
        messages = [frame(first), *(frame(self._ring_step(n, n)[0]) for n in range(2))]
        return Conversation(PUSH_STREAM, messages, waits=False)

    def _pass(self) -> Conversation:
        name = self.random.choice(["rpc_forward", "rpc_backward"])
        whole = self._pass_request(name)
        parts = [Request(uid=whole.uid, metadata=whole.metadata, tensors=[tensor]) for tensor in whole.tensors]
        for part in parts:
            if self.random.random() < 0.1:
                part.tensors[0].dtype = ""
            if self.random.random() < 0.1:
                part.uid = self._uid()
        messages = [self._maybe_flipped_frame(part) for part in parts]
        return Conversation(f"{HANDLER}.{name}_stream", messages, waits=self.random.random() < 0.8)

    # -- messages ------------------------------------------------------------------------------------------------------

    def _opening(self, metadata: dict[str, Any], *, tokens: int | None = None, odd: bool = True) -> Request:
        named: dict[str, Any] = {"session_id": self._fresh_name(), "max_length": 16, "alloc_timeout": 0.0}
        if odd and self.random.random() < 0.5:
            named[self.random.choice(["session_id", "max_length", "alloc_timeout", "args_structure"])] = self._odd()
        request = self._session_step({**named, **metadata}, tokens=tokens)
        request.uid = self._uid() if odd else self._honest_uid()
        return request

    def _session_step(self, metadata: dict[str, Any], *, tokens: int | None = None) -> Request:
        tensors = [self._hidden_states(tokens=tokens), DUMMY, DUMMY_INT64]
        packed, structure = pack_args_kwargs(*tensors)
        named: dict[str, Any] = {
            "step_id": self.random.choice(["a", "b", None, self._odd()]),
            "args_structure": structure,
        }
        if self.random.random() < 0.2:
            named["args_structure"] = self._odd()
        if self.random.random() < 0.2:
            named["next_servers"] = self._next_servers()
        request = Request(metadata=self._pack({**named, **metadata}), tensors=map(serialize, packed))
        self._spoil(request)
        return request

    def _ring_step(self, number: int, position: int) -> tuple[Request, int]:
        tokens = self.random.choice([1, 1, 2, 5])
        odd = self.random.random() < 0.4
        step = [number, position, self.random.randrange(3), self.random.random() < 0.2, ()]
        metadata = Step(number, position, Want.ALL).to_bytes()
        if odd:
            step[self.random.randrange(5)] = self._odd()
            metadata = self._pack({"step": step})
        tensors = [serialize(self._hidden_states(tokens=tokens))]
        if self.random.random() < 0.3:
            tensors += [
                serialize(DUMMY),
                serialize(torch.tensor(self.random.choice([[0], [5], [-1], [0, 0], [2**60]]))),
            ]
        request = Request(metadata=metadata, tensors=tensors)
        if self.random.random() < 0.3:
            self._spoil(request)
        return request, tokens

    def _pass_request(self, name: str) -> Request:
        hidden = self._hidden_states()
        arguments = [hidden] if name == "rpc_forward" else [hidden, self._hidden_states(like=hidden)]
        prompts = torch.zeros(
            self.random.choice([1, len(self._blocks)]), 1, self.random.choice([0, 1, 9]), self._hidden
        )
        packed, structure = pack_args_kwargs(*arguments, prompts if self.random.random() < 0.3 else DUMMY)
        metadata = {"args_structure": structure if self.random.random() < 0.8 else self._odd()}
        request = Request(uid=self._uid(), metadata=self._pack(metadata), tensors=map(serialize, packed))
        if self.random.random() < 0.5:
            self._spoil(request)
        return request

    def _hidden_states(self, *, tokens: int | None = None, like: torch.Tensor | None = None) -> torch.Tensor:
        if like is not None and self.random.random() < 0.7:
            return torch.ones_like(like)
        batch = self.random.choice([1, 1, 1, 2, 40])
        length = self.random.choice([0, 1, 3, 20]) if tokens is None else tokens
        width = self._hidden if self.random.random() < 0.9 else self.random.choice([0, 1, 63, 128])
        hidden = torch.randn(batch if tokens is None else 1, length, width)
        if self.random.random() < 0.2 and hidden.numel():
            hidden.view(-1)[self.random.randrange(hidden.numel())] = self.random.choice([math.nan, math.inf, 3e38])
        return hidden.to(self.random.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16]))

    def _spoil(self, request: Request) -> None:
        for tensor in request.tensors:
            what = self.random.randrange(12)
            if what == 0:
                tensor.size[:] = [self.random.choice(ODD_SIZES) for _ in range(self.random.randrange(10))]
            elif what == 1:
                tensor.dtype = self.random.choice(ODD_DTYPES)
            elif what == 2:
                tensor.compression = self.random.randrange(7)
            elif what == 3:
                tensor.buffer = tensor.buffer[: self.random.randrange(len(tensor.buffer) + 1)]
            elif what == 4:
                tensor.size.append(1)
        if self.random.random() < 0.1 and request.tensors:
            del request.tensors[self.random.randrange(len(request.tensors))]
        if self.random.random() < 0.05:
            request.tensors.extend([runtime_pb2.Tensor()] * self.random.choice([1, 20]))

    def _uid(self) -> str:
        if self.random.random() < 0.7:
            return self._honest_uid()
        blocks = [self.random.choice([-1, 0, 1, 2, 3, 5, 6, 10**6, 10**30]) for _ in range(self.random.randrange(4))]
        name = self.random.choice([self._swarm, "", "other", self._swarm + " "])
        return " ".join(f"{name}.{block}" for block in blocks)

    def _honest_uid(self) -> str:
        return " ".join(f"{self._swarm}.{block}" for block in self._blocks)

    def _next_servers(self) -> Any:
        peer = self.random.choice(self._peers)
        return self.random.choice([[[peer, self._name(), 0, 3]], [[peer, "x", -5, 10**9]], [[1, 2]], self._odd()])

    def _next_hop(self) -> NextHop | None:
        return None if self.random.random() < 0.5 else NextHop(peer_id=self.random.choice(self._peers), session_id="x")

    def _name(self) -> str:
        return self.random.choice([*self._names[-4:], "nobody", "x" * 200])

    def _fresh_name(self) -> str:
        self._numbers += 1
        return f"hostile {id(self)} {self._numbers}"

    def _odd(self) -> Any:
        return self.random.choice(ODD_VALUES)

    def _pack(self, metadata: dict[str, Any]) -> bytes:
        try:
            return write_metadata(metadata)
        except (OverflowError, ValueError):
            return write_metadata({})

    def _maybe_flipped(self, data: bytes) -> bytes:
        if self.random.random() > 0.2 or not data:
            return data
        flipped = bytearray(data)
        for _ in range(self.random.randrange(1, 8)):
            flipped[self.random.randrange(len(flipped))] = self.random.randrange(256)
        return bytes(flipped)

    def _maybe_flipped_frame(self, request: Request) -> bytes:
        body = self._maybe_flipped(request.SerializeToString())
        return b"\x00" + len(body).to_bytes(8, "big") + body


def nested(depth: int) -> bytes:
    """msgpack: hivemind's tuples within tuples."""
    data = b"\xc0"
    for _ in range(depth):
        inner = b"\x91" + data
        data = b"\xc9" + struct.pack(">IB", len(inner), 0x40) + inner
    return b"\x81\xa1x" + data


def ends() -> Iterator[bytes]:
    """An honest end of any stream."""
    yield frame(Request())
    yield from OVER
