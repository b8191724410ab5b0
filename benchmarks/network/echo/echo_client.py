"""Answers a message with as many new bytes as it asks for; the same ones would not be sent, since Flower knows their hash."""

import os

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def _(message: Message, context: Context) -> Message:
    asked = message.content["asked"]
    assert isinstance(asked, ConfigRecord)
    size = asked["up"]
    assert isinstance(size, int)
    data = os.urandom(size)
    array = Array(dtype="bytes", shape=(len(data),), stype="safetensors", data=data)
    return Message(RecordDict({"payload": ArrayRecord({"body": array})}), reply_to=message)
