"""Sends bytes to all nodes and waits for theirs, as often as asked, and notes how long each exchange took.

It looks for replies every half second, as umbel does. Flower's own strategies look every three, so they are no faster.
"""

import json
import os
import time
from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

POLL_SECONDS = 0.5

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    given = context.run_config
    out = Path(str(given["out"]))
    while len(nodes := list(grid.get_node_ids())) < int(given["nodes"]):
        time.sleep(POLL_SECONDS)
    seconds, got = [], []
    for down, up in json.loads(str(given["sizes"])):
        began = time.perf_counter()
        got.append(_exchange(grid, nodes, down, up))
        seconds.append(time.perf_counter() - began)
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps({"seconds": seconds, "bytes_up": got}), encoding="utf-8")
    partial.replace(out)


def _exchange(grid: Grid, nodes: list[int], down: int, up: int) -> int:
    """Returns how many bytes came back from all."""
    data = os.urandom(down)
    array = Array(dtype="bytes", shape=(len(data),), stype="safetensors", data=data)
    sent = set()
    for node in nodes:
        content = RecordDict({"payload": ArrayRecord({"body": array}), "asked": ConfigRecord({"up": up})})
        sent |= set(grid.push_messages([Message(content, node, "train", ttl=600.0)]))
    total = 0
    while sent:
        replies = list(grid.pull_messages(sent))
        for reply in replies:
            if reply.has_error():
                raise RuntimeError(f"node {reply.metadata.src_node_id}: {reply.error.reason}")
            record = reply.content["payload"]
            assert isinstance(record, ArrayRecord)
            total += len(record["body"].data)
            sent.remove(reply.metadata.reply_to_message_id)
        if not replies:
            time.sleep(POLL_SECONDS)
    return total
