"""Our few messages are the ones that Flower's own classes write and read."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbel import superlink

control = pytest.importorskip("flwr.proto.control_pb2", reason="flwr is not installed")
fleet = pytest.importorskip("flwr.proto.fleet_pb2")
node = pytest.importorskip("flwr.proto.node_pb2")

IDS = st.integers(1, 2**64 - 1)


@given(st.binary(min_size=1, max_size=300), st.text("abc-é", min_size=1))
def test_requests(key: bytes, name: str) -> None:
    asked = control.RegisterNodeRequest.FromString(superlink.encode((1, key), (3, name.encode())))
    assert (asked.public_key, asked.name, asked.HasField("location")) == (key, name, False)
    probe = fleet.ActivateNodeRequest.FromString(superlink.encode((1, key), (2, -1.0)))
    assert (probe.public_key, probe.heartbeat_interval) == (key, -1.0)


@given(IDS)
def test_node_ids(number: int) -> None:
    message = superlink.encode((1, number))
    assert control.UnregisterNodeRequest.FromString(message).node_id == number
    assert fleet.DeactivateNodeRequest.FromString(message).node_id == number
    assert dict(superlink.decode(control.RegisterNodeResponse(node_id=number).SerializeToString())) == {1: number}


@given(st.lists(st.tuples(IDS, st.binary(min_size=1), st.floats(allow_nan=False)), max_size=5))
def test_lists_of_nodes(rows: list[tuple[int, bytes, float]]) -> None:
    infos = [node.NodeInfo(node_id=i, public_key=key, online_until=until, status="online", name="é") for i, key, until in rows]
    message = control.ListNodesResponse(nodes_info=infos, now="now").SerializeToString()
    found = [dict(superlink.decode(value)) for number, value in superlink.decode(message) if number == 1]  # type: ignore[arg-type]
    assert [(fields[1], fields[11], fields[4]) for fields in found] == [(i, key, b"online") for i, key, _ in rows]


@given(st.binary(max_size=60))
def test_what_is_no_message_is_refused_in_our_words(junk: bytes) -> None:
    with contextlib.suppress(superlink.ApiError):
        assert all(number >= 0 for number, _ in superlink.decode(junk))


def test_a_message_cut_short_is_refused() -> None:
    whole = control.RegisterNodeRequest(public_key=b"key").SerializeToString()
    with pytest.raises(superlink.ApiError):
        list(superlink.decode(whole[:-1]))
