"""The ClientApp: takes an adapter, trains it, sends it back. It would be the same for FedAvg."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from topics import load_adapter, load_model, read_adapter, rows_of, train

app = ClientApp()


@app.train()
def _(message: Message, context: Context) -> Message:
    config = context.run_config
    client, clients = context.node_config["partition-id"], context.node_config["num-partitions"]
    rows = rows_of(client, clients)
    model = load_model(config["seed"])
    load_adapter(model, message.content["arrays"].to_torch_state_dict())
    number = message.content["config"]["server-round"]
    loss = train(model, rows, config["steps"], config["learning-rate"], seed=1000 * number + client)
    metrics = MetricRecord({"train-loss": loss, "num-examples": len(rows)})
    return Message(RecordDict({"arrays": ArrayRecord(read_adapter(model)), "metrics": metrics}), reply_to=message)
