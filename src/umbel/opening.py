"""The opening: clients say what they have, and the run is of those who agree; later, who comes late."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from umbel import preflight, wire
from umbel.asking import Heard, Plan, check_quorum, counted, in_order, read, rows_of
from umbel.engine import NO_REPLY, Engine
from umbel.method import taking_mixed_ranks
from umbel.server import LayerShape, Refused, Server, ServerError

Schema = dict[str, LayerShape | tuple[int, ...]]
"""What clients must agree on: layers by name, and the shapes of other parameters under "plain|<name>"."""


def agree(engine: Engine, plan: Plan, heard: Heard, barred: set[int]) -> tuple[Server, dict[int, int]]:
    """Asks every client for its layers and rows; those whose layers or other parameters are not the majority's are left out."""
    rows, said = _ask_all(engine, plan, plan.clients, heard)
    if not said:
        raise ServerError(f"no client answered the opening ({heard.reasons()})")
    ranks = {client: _ranks(own) for client, own in said.items()}
    if plan.method.mixed_ranks:
        most = {layer: max(own.get(layer, 1) for own in ranks.values()) for own in ranks.values() for layer in own}
        said = {client: _with_ranks(own, most) for client, own in said.items()}
    agreed = _majority(said)
    for client, own in said.items():
        if own == agreed:
            heard.answered.append(client)
        else:
            heard.refuse(client, _difference(client, own, agreed))
    check_quorum(plan, "the opening", plan.clients, heard)
    barred |= set(heard.replies) - set(heard.answered)
    rows = {client: rows[client] for client in heard.answered}
    layers = {name: shape for name, shape in agreed.items() if isinstance(shape, LayerShape)}
    largest = {name: max(ranks[client][name] for client in rows) for name in layers}
    layers = {name: replace(shape, rank=largest[name]) for name, shape in layers.items()}
    plain = {name.removeprefix("plain|"): x for name, x in agreed.items() if not isinstance(x, LayerShape)}
    server = Server(layers, plan.seed, plan.dtype, plain)
    for client in rows:
        for layer in layers:
            server.note_rank(client, layer, ranks[client][layer])
    return server, rows


def _ask_all(engine: Engine, plan: Plan, clients: list[int], heard: Heard) -> tuple[dict[int, int], dict[int, Schema]]:
    """Returns what clients say of their rows and layers; those whose facts are not the server's are refused."""
    rows: dict[int, int] = {}
    said: dict[int, Schema] = {}
    wanted = {} if plan.expected is None else {"preflight": True}

    def request(client: int) -> bytes:
        return wire.encode(wire.Message({**heard.echo(client), **wanted}))

    for reply in in_order(engine.ask(counted(clients, request, heard)), clients):
        message = read(reply, heard)
        if message is None:
            continue
        client = reply.client
        try:
            if plan.expected is not None:
                heard.facts[str(client)] = facts = preflight.read(message.header.get("preflight"))
                wrong = preflight.mismatch(plan.expected, facts)
                if wrong:
                    raise Refused(f"client {client}: {wrong}")
            rows[client] = rows_of(client, message.header)
            said[client] = _schema(client, message.header, plan.most_rank)
            if plan.expected is not None:
                heard.facts[str(client)]["layers"] = len(_ranks(said[client]))
        except Refused as error:
            heard.refuse(client, str(error))
    return rows, said


def join(engine: Engine, plan: Plan, server: Server, rows: dict[int, int], barred: set[int], heard: Heard) -> None:
    """Asks those who were not there at the opening once more; who fits the others takes part from this round on."""
    missing = [client for client in plan.clients if client not in rows and client not in barred]
    if not missing:
        return
    opening = Heard(plan.run, heard.round, "open")
    counted, said = _ask_all(engine, plan, missing, opening)
    plain = {f"plain|{name}": shape for name, shape in (server.plain_shapes or {}).items()}
    agreed: Schema = {**server.layers, **plain}
    for client, own in said.items():
        ranks = _ranks(own)
        large = [name for name, shape in server.layers.items() if ranks.get(name, 0) > shape.rank]
        if plan.method.mixed_ranks and large:
            most = server.layers[large[0]].rank
            opening.refuse(
                client, f"layer {large[0]!r}: client {client} has rank {ranks[large[0]]}, the run's largest is {most}"
            )
            continue
        if plan.method.mixed_ranks:
            own = _with_ranks(own, {**ranks, **_ranks(agreed)})
        if own != agreed:
            opening.refuse(client, _difference(client, own, agreed))
            continue
        rows[client] = counted[client]
        opening.joined.append(client)
        for layer in server.layers:
            server.note_rank(client, layer, ranks[layer])
    barred |= set(opening.replies) - set(rows)
    # Who is connected and silent for a whole deadline would cost every later round another one.
    barred |= {refused["client"] for refused in opening.refused if refused["reason"].startswith(NO_REPLY)}
    heard.add(opening)


def _schema(client: int, header: Mapping[str, Any], most_rank: int = 0) -> Schema:
    """Reads what a client says of its layers, and, named "plain|…", of its parameters that are not factors."""
    layers = header.get("layers")
    if not isinstance(layers, dict) or not layers:
        raise Refused(f"client {client} says its layers are {layers!r:.80}, allowed: one or more with (d_out, d_in, rank)")
    for name, shape in layers.items():
        if not isinstance(shape, list) or len(shape) != 3 or not all(type(n) is int and 1 <= n < 2**31 for n in shape):
            raise Refused(f"layer {name!r}: client {client} says {shape!r:.80}, allowed: d_out, d_in and rank, 1 or more each")
        # One client's word must not make everybody's factors large.
        most = most_rank or max(shape[:2])
        if shape[2] > most:
            raise Refused(f"layer {name!r}: client {client} says rank {shape[2]}, allowed: 1 to {most}")
    plain = header.get("plain", {})
    if not isinstance(plain, dict):
        raise Refused(f"client {client} says its other parameters are {plain!r:.80}, allowed: names with shapes")
    for name, shape in plain.items():
        if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**31 for n in shape):
            raise Refused(f"parameter {name!r}: client {client} says {shape!r:.80}, allowed: a list of sizes")
    others = {f"plain|{name}": tuple(shape) for name, shape in plain.items()}
    return {**{name: LayerShape(*shape) for name, shape in layers.items()}, **others}


def _ranks(schema: Schema) -> dict[str, int]:
    return {name: shape.rank for name, shape in schema.items() if isinstance(shape, LayerShape)}


def _with_ranks(schema: Schema, ranks: Mapping[str, int]) -> Schema:
    return {name: replace(x, rank=ranks[name]) if isinstance(x, LayerShape) else x for name, x in schema.items()}


def _majority(said: Mapping[int, Schema]) -> Schema:
    """Returns the layers that most clients have, in the order in which the first of them names them."""
    (most, count), *others = Counter(frozenset(layers.items()) for layers in said.values()).most_common(2)
    agreed = next(layers for layers in said.values() if frozenset(layers.items()) == most)
    if others and others[0][1] == count:
        client, own = next((client, own) for client, own in said.items() if own != agreed)
        raise ServerError(_difference(client, own, agreed))
    return agreed


def _difference(client: int, own: Schema, others: Schema) -> str:
    name = next(name for name in {**others, **own} if own.get(name) != others.get(name))
    mine, theirs = own.get(name), others.get(name)
    if isinstance(mine, LayerShape) and isinstance(theirs, LayerShape) and replace(mine, rank=theirs.rank) == theirs:
        return f"layer {name!r}: client {client} has rank {mine.rank}, others {theirs.rank}; {taking_mixed_ranks()}"
    return (
        f"layer {name!r}: client {client} has {mine}, others {theirs}. All clients need the same base model and the same [lora]"
    )
