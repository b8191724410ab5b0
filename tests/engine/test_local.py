"""The engine in this process: bytes in, bytes out, and one client's failure is its own."""

import pytest

from umbel.engine import Ask, Reply
from umbel.engine.local import Local


def echo(number):
    return lambda payload: payload + str(number).encode()


def broken(payload):
    raise KeyError("no such row")


def asks(*clients):
    return [Ask(client, b"hello ") for client in clients]


def test_every_ask_gets_its_clients_answer():
    assert list(Local({0: echo(0), -1: echo(-1)}).ask(asks(-1, 0, -1))) == [
        Reply(-1, b"hello -1"),
        Reply(0, b"hello 0"),
        Reply(-1, b"hello -1"),
    ]


def test_a_client_that_fails_gives_type_message_and_place_and_the_others_answer():
    first, second, third = Local({0: echo(0), 1: broken, 2: echo(2)}).ask(asks(0, 1, 2))
    assert (first.payload, second.payload, third.payload) == (b"hello 0", None, b"hello 2")
    line = broken.__code__.co_firstlineno + 1
    assert second.reason == f"KeyError: 'no such row' (test_local.py:{line})"


def test_a_client_that_is_not_there_is_one_that_fails():
    (reply,) = Local({0: echo(0)}).ask(asks(5))
    assert reply.payload is None
    assert reply.reason.startswith("KeyError: 5")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_the_end_of_the_process_is_no_clients_failure(error):
    def stop(payload):
        raise error

    with pytest.raises(error):
        list(Local({0: stop}).ask(asks(0)))


def test_an_error_in_making_a_request_is_no_clients_failure():
    def requests():
        yield Ask(0, b"hello ")
        raise ValueError("the server's own")

    replies = Local({0: echo(0)}).ask(requests())
    assert next(replies).payload == b"hello 0"
    with pytest.raises(ValueError, match="the server's own"):
        next(replies)


def test_a_client_is_asked_only_when_its_reply_is_wanted():
    said = []
    replies = Local({k: lambda payload, k=k: said.append(k) or b"" for k in range(3)}).ask(asks(0, 1, 2))
    assert said == []
    next(replies)
    assert said == [0]
    list(replies)
    assert said == [0, 1, 2]
