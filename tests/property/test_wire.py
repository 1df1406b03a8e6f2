"""Properties of the codecs: what is written is read again, however it was cut; garbage gives typed errors."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.support import json_texts, messages
from ztna import packet
from ztna.errors import PacketError, ProtocolError
from ztna.jsontypes import from_json, to_json
from ztna.leases import Holding, Lease, Port, Wish, WishAnswer
from ztna.names import ConnectorId, ServiceName, SessionId
from ztna.reasons import Reason
from ztna.wire import control, datagram, forwarder, stream
from ztna.wire.control import (
    Address,
    AnyMessage,
    Binary,
    ForwarderBind,
    LeaseRef,
    LifeMessage,
    PeerIdentity,
    Secret,
)

thorough = settings(max_examples=2000, deadline=None)
usual = settings(max_examples=300, deadline=None)

ips = st.one_of(
    st.integers(0, 2**32 - 1).map(lambda n: str(IPv4Address(n))),
    st.integers(0, 2**128 - 1).map(lambda n: str(IPv6Address(n))),
)
ports = st.integers(0, 65535)
addresses = st.builds(Address, ips, ports)
sessions = st.binary(min_size=8, max_size=8).map(SessionId.from_bytes)
labels = st.from_regex(r"[a-z0-9](?:[a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
services = labels.filter(lambda text: text not in ("connector", "relay", "ns")).map(ServiceName)
connectors = labels.map(ConnectorId)
leases = st.builds(LeaseRef, st.integers(0, 2**32 - 1).map(IPv4Address), st.integers(0, 2**63 - 1))
secrets = st.binary(min_size=16, max_size=64).map(Secret)
tokens = st.binary(min_size=32, max_size=32).map(Secret)
fingerprints = st.binary(min_size=32, max_size=32).map(bytes.hex)
reasons = st.sampled_from(Reason)
binds = st.builds(ForwarderBind, addresses, st.binary(min_size=16, max_size=16).map(Binary), secrets)
candidates = st.lists(addresses, max_size=control.CANDIDATES_MAX).map(tuple)
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=50)
counters = st.integers(0, 2**63 - 1)
published = st.builds(Port, st.sampled_from(["tcp", "udp", "icmp"]), st.integers(1, 65535))

control_messages: st.SearchStrategy[AnyMessage] = st.one_of(
    st.builds(
        control.Hello, st.integers(0, 99), st.frozensets(texts, max_size=5), texts.map(control.Software)
    ),
    st.builds(
        control.Register,
        connectors,
        st.lists(
            st.builds(control.Offering, services, st.lists(published, max_size=3).map(tuple)), max_size=5
        ).map(tuple),
        st.none() | addresses,
    ),
    st.builds(control.Registered, services),
    st.builds(control.Refused, texts, reasons),
    st.builds(control.Open, counters, services, st.none() | leases, st.none() | connectors),
    st.builds(
        control.Offered,
        sessions,
        services,
        st.builds(PeerIdentity, texts, fingerprints),
        st.none() | leases,
        st.none() | binds,
        secrets,
        st.booleans(),
    ),
    st.builds(control.Accepted, sessions),
    st.builds(
        control.Opened,
        counters,
        sessions,
        services,
        connectors,
        fingerprints,
        st.none() | addresses,
        st.none() | binds,
        secrets,
    ),
    st.builds(control.Denied, counters, texts, reasons),
    st.builds(control.Dial, sessions),
    st.builds(control.DialToken, sessions, tokens),
    st.builds(control.Carry, sessions, tokens),
    st.builds(control.Closed, sessions, reasons),
    st.builds(control.Retired, sessions),
    st.builds(control.CandidateOffer, sessions, candidates),
    st.builds(control.CandidateAnswer, sessions, candidates),
    st.builds(control.StartPunching, sessions, candidates, st.integers(0, 10_000)),
    st.builds(control.PunchingResult, sessions, st.booleans(), st.none() | addresses),
    st.builds(control.Health, services, texts),
    st.builds(control.Conflict, cidr=texts, with_=texts, detail=texts),
    st.builds(control.Drain, st.floats(0, 86_400), st.lists(texts, max_size=3).map(tuple)),
    st.builds(
        control.DnsQuery, st.integers(0, 2**63 - 1), st.binary(min_size=12, max_size=64).map(control.Binary)
    ),
    st.builds(
        control.DnsResponse,
        st.integers(0, 2**63 - 1),
        st.binary(min_size=12, max_size=64).map(control.Binary),
    ),
)

life_messages: st.SearchStrategy[LifeMessage] = st.one_of(
    st.builds(control.Ping),
    st.builds(control.Pong),
    st.builds(control.Goodbye, st.integers(0, 2**32 - 1), texts),
)

times = st.floats(0, 2**40)
records = st.one_of(
    st.builds(
        Lease,
        st.integers(0, 2**32 - 1).map(IPv4Address),
        counters,
        st.lists(published, max_size=3).map(tuple),
    ),
    st.builds(Holding, services, counters, st.sampled_from(("leased", "quarantined")), st.booleans(), times),
    st.builds(
        Wish,
        st.sampled_from(("pin", "unpin", "release", "move")),
        texts,
        asked_at=times,
        answer=st.none() | st.builds(WishAnswer, st.booleans(), texts, times),
    ),
)

counted = st.binary(max_size=255)
datagrams: st.SearchStrategy[datagram.Datagram] = st.one_of(
    st.builds(datagram.Qad, ips, ports),
    st.builds(datagram.RegisterAgent, counted),
    st.builds(datagram.RegisterConnector, counted),
    st.builds(datagram.Ack, counted),
    st.builds(datagram.Nack, st.sampled_from(datagram.NackStatus), counted),
    st.builds(
        datagram.ServicePacket, st.binary(min_size=1, max_size=255), st.binary(min_size=1, max_size=1500)
    ),
    st.builds(datagram.SessionPacket, sessions, st.binary(min_size=1, max_size=1500)),
    st.binary(max_size=50).map(lambda rest: datagram.RawPacket(b"\x45" + rest)),
)

macs = st.binary(min_size=16, max_size=16)
transactions = st.binary(min_size=12, max_size=12)
nonces = st.binary(min_size=8, max_size=8)
forwarder_packets: st.SearchStrategy[forwarder.ForwarderPacket] = st.one_of(
    st.builds(forwarder.Bind, macs, macs),
    st.builds(forwarder.Challenge, nonces),
    st.builds(forwarder.Bound, nonces, addresses),
    st.builds(forwarder.Probe, transactions, macs),
    st.builds(forwarder.ProbeAnswer, transactions, macs),
)

flows = st.binary(min_size=16, max_size=16).map(bytes.hex)
windows = st.integers(stream.WINDOW_BYTES_MIN, stream.WINDOW_BYTES_MAX)
opens = st.builds(stream.OpenFrame, sessions, flows, services, leases, addresses, addresses, windows)
resumes = st.builds(stream.ResumeFrame, sessions, flows, st.integers(1, 2**31 - 1), counters, windows)
packets = st.builds(
    stream.PacketsFrame,
    sessions,
    services,
    st.lists(sessions, max_size=stream.FORMER_SESSIONS_MAX).map(tuple),
)
frames_of_json = st.one_of(opens, resumes, packets)
stream_frames: st.SearchStrategy[stream.Frame] = st.one_of(
    frames_of_json,
    st.builds(stream.PacketFrame, st.binary(min_size=stream.IP_PACKET_BYTES_MIN, max_size=300)),
    st.builds(stream.OpenedFrame, st.sampled_from(stream.OpenStatus), windows),
    st.builds(stream.Data, st.binary(max_size=300)),
    st.builds(stream.Fin),
    st.builds(stream.ResetFrame, st.integers(0, 255)),
    st.builds(stream.Ack, st.integers(0, 2**64 - 1)),
    st.builds(stream.ResumedFrame, st.integers(0, 2**64 - 1), windows),
)


@thorough
@given(datagrams)
def test_a_datagram_is_read_as_it_was_written(value: datagram.Datagram) -> None:
    assert datagram.decode(datagram.encode(value)) == value


@thorough
@given(forwarder_packets)
def test_a_forwarder_packet_is_read_as_it_was_written(value: forwarder.ForwarderPacket) -> None:
    data = forwarder.encode(value)
    assert forwarder.decode(data) == value
    assert not forwarder.is_quic(data[0])


@thorough
@given(st.lists(control_messages, max_size=4), st.data())
def test_control_messages_are_read_as_they_were_written_in_any_pieces(
    values: list[AnyMessage], data: st.DataObject
) -> None:
    whole = b"".join(map(control.encode, values))
    reader = control.FrameReader()
    assert [value for piece in pieces(whole, data) for value in reader.feed(piece)] == values


@usual
@given(control_messages, json_texts.OF_THE_NEXT_RELEASE)
def test_unknown_fields_change_no_control_message_and_are_counted(
    message: AnyMessage, new: dict[str, str]
) -> None:
    body = json_texts.with_fields(control.encode(message)[4:], new)
    assume(len(body) <= control.MESSAGE_BYTES_MAX)
    reader = control.FrameReader()
    assert reader.feed(len(body).to_bytes(4) + body) == [message]
    assert reader.take_unknown_fields() == len(new)


@usual
@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_a_release_of_any_text_is_read_and_can_be_printed(software: str) -> None:
    body = json.dumps({"type": "hello", "software": software}).encode()
    (message,) = control.FrameReader().feed(len(body).to_bytes(4) + body)
    assert isinstance(message, control.Hello)
    assert message.software.isprintable()
    assert len(message.software) == min(len(software), control.SOFTWARE_CHARACTERS_MAX)


@usual
@given(st.text(st.characters(exclude_categories=("Cs",))), json_texts.OF_THE_NEXT_RELEASE)
def test_unknown_types_of_control_messages_end_nothing(kind: str, new: dict[str, str]) -> None:
    assume(kind not in control.FEATURES | {"hello"})
    body = json_texts.with_fields(json.dumps({"type": kind}).encode(), new)
    (message,) = control.FrameReader().feed(len(body).to_bytes(4) + body)
    assert isinstance(message, control.UnknownMessage)


@usual
@given(frames_of_json, json_texts.OF_THE_NEXT_RELEASE)
def test_unknown_fields_change_no_stream_frame(frame: stream.Frame, new: dict[str, str]) -> None:
    head, body = stream.encode(frame)[:1], stream.encode(frame)[4:]
    more = json_texts.with_fields(body, new)
    assume(len(more) <= stream.JSON_BYTES_MAX)
    assert stream.FrameReader().feed(head + len(more).to_bytes(3) + more) == [frame]


@thorough
@given(st.lists(stream_frames, max_size=6), st.data())
def test_stream_frames_are_read_as_they_were_written_in_any_pieces(
    values: list[stream.Frame], data: st.DataObject
) -> None:
    whole = b"".join(map(stream.encode, values))
    reader = stream.FrameReader()
    got = [value for piece in pieces(whole, data) for value in reader.feed(piece)]
    assert joined(got) == joined(values)


@thorough
@given(st.sampled_from((4, 6)), st.data(), ports, ports, st.binary(max_size=1500))
def test_a_udp_packet_is_read_as_it_was_built(
    version: int, data: st.DataObject, source_port: int, destination_port: int, payload: bytes
) -> None:
    make, bits = (IPv4Address, 32) if version == 4 else (IPv6Address, 128)
    source, destination = (str(make(data.draw(st.integers(0, 2**bits - 1)))) for _ in range(2))
    built = packet.build_udp(source, source_port, destination, destination_port, payload)
    assert packet.parse(built) == packet.Packet(
        version, source, destination, packet.PROTOCOL_UDP, source_port, destination_port, payload
    )
    error = packet.parse(packet.icmp_error(built, packet.Unreachable.HOST))
    assert (error.source, error.destination) == (destination, source)
    assert built.startswith(error.payload)


@pytest.mark.parametrize(
    ("read", "corpus", "allowed"),
    [
        (datagram.decode, messages.DATAGRAMS, ProtocolError),
        (forwarder.decode, messages.FORWARDER_PACKETS, ProtocolError),
        (packet.parse, messages.PACKETS, PacketError),
        (lambda data: control.FrameReader().feed(data), messages.CONTROL_FRAMES, ProtocolError),
        (lambda data: stream.FrameReader().feed(data), messages.STREAM_FRAMES, ProtocolError),
    ],
    ids=["datagram", "forwarder", "packet", "control", "stream"],
)
def test_garbage_gives_a_value_or_a_typed_error(
    read: Callable[[bytes], object], corpus: tuple[bytes, ...], allowed: type[Exception]
) -> None:
    starts = st.sampled_from(corpus).flatmap(lambda good: st.integers(0, len(good)).map(lambda at: good[:at]))

    @thorough
    @given(st.one_of(st.binary(max_size=200), st.builds(lambda a, b: a + b, starts, st.binary(max_size=50))))
    def check(data: bytes) -> None:
        with contextlib.suppress(allowed):
            read(data)

    check()


@thorough
@given(control_messages | life_messages, json_texts.ANYTHING | json_texts.NO_JSON, st.data())
def test_any_value_in_a_control_message_gives_a_message_or_a_typed_error(
    message: AnyMessage | LifeMessage, value: str, data: st.DataObject
) -> None:
    body = json_texts.with_a_value_replaced(control.encode(message)[4:], value, data)
    for feed in (control.FrameReader().feed, control.FrameReader().feed_tls):
        with contextlib.suppress(ProtocolError):
            for read in feed(len(body).to_bytes(4) + body):
                assert isinstance(read, control.UnknownMessage) or control.encode(read)


@thorough
@given(frames_of_json, json_texts.ANYTHING | json_texts.NO_JSON, st.data())
def test_any_value_in_a_stream_frame_gives_a_frame_or_a_typed_error(
    frame: stream.Frame, value: str, data: st.DataObject
) -> None:
    body = json_texts.with_a_value_replaced(stream.encode(frame)[4:], value, data)
    with contextlib.suppress(ProtocolError):
        for read in stream.FrameReader().feed(stream.encode(frame)[:1] + len(body).to_bytes(3) + body):
            assert stream.encode(read)


@thorough
@given(records, json_texts.ANYTHING | json_texts.NO_JSON, st.data())
def test_any_value_in_a_record_gives_one_that_can_be_used_or_a_typed_error(
    record: Lease | Holding | Wish, value: str, data: st.DataObject
) -> None:
    body = json_texts.with_a_value_replaced(to_json(record), value, data)
    with contextlib.suppress(ProtocolError):
        read = from_json(body, type(record))
        assert from_json(to_json(read), type(record)) == read
        if isinstance(read, Lease):
            # What an agent opens and a connector registers with it, their relays take.
            message = control.Open(1, ServiceName("web"), LeaseRef(read.ip, read.epoch))
            assert control.FrameReader().feed(control.encode(message)) == [message]
            assert all(0 <= port.port <= 65535 for port in read.ports)


@thorough
@given(datagrams)
def test_what_is_read_is_written_as_it_was(value: datagram.Datagram) -> None:
    data = datagram.encode(value)
    assert datagram.encode(datagram.decode(data)) == data


def pieces(whole: bytes, data: st.DataObject) -> list[bytes]:
    """Cut the bytes at places that hypothesis chooses."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    return [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]


def joined(frames: list[stream.Frame]) -> list[object]:
    """Return the frames with the bytes of neighbouring DATA put together: its borders mean nothing."""
    out: list[object] = []
    for frame in frames:
        if not isinstance(frame, stream.Data):
            out.append(frame)
        elif out and isinstance(out[-1], bytes):
            out[-1] += bytes(frame.data)
        elif frame.data:
            out.append(bytes(frame.data))
    return out
