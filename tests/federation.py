"""A federation of real clients over a tiny real model, in this process, without a job around it."""

from umbel import wire
from umbel.client import client, data, model
from umbel.client.adapter import Adapter
from umbel.client.client import Client, Resident
from umbel.config import configs
from umbel.engine.local import Local
from umbel.loop import Plan, federate
from umbel.record import CHECKPOINT, Record
from umbel.server import OBSERVER


class Site:
    """All clients and the observer, over one model, each with a folder of its own.

    `run(change)` takes what `change` makes of the clients' answers in the place of some, and options of `Plan`; it returns
    the record's lines. `ending()` is the server's state as bytes.
    """

    def __init__(self, folder, table):
        (self.config,) = configs(table).values()
        self.folder, self.dataset = folder, data.load(self.config)
        self.base = model.load(self.config, len(self.dataset.labels))
        train, test = client.tokens(self.config, self.base, self.dataset)
        self.adapter = Adapter(self.base.model, self.config.lora, self.base.heads, self.config.seed)
        self.resident = Resident(self.config, self.base, self.adapter, self.dataset, train, test)
        numbers = [*range(self.dataset.clients), OBSERVER]
        self.clients = {k: Client(k, self.resident, folder / "clients" / str(k)) for k in numbers}

    def run(self, change=None, **options):
        answers = {k: one.answer for k, one in self.clients.items()}
        plan = Plan(self.resident.method, self.config.rounds, list(range(self.dataset.clients)), self.config.seed, **options)
        federate(Local(answers | (change(answers) if change else {})), plan, Record(self.folder))
        return Record(self.folder).lines()

    def ending(self):
        tensors = wire.decode((self.folder / CHECKPOINT).read_bytes()).tensors
        return {name: x.numpy().tobytes() for name, x in tensors.items()}
