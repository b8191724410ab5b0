"""The ServerApp: FedAvg, or a method of umbel's in its place."""

import random

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from topics import LORA, accuracy, load_adapter, load_model, load_rows, read_adapter

from umbel.engine.flower import as_strategy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    model = load_model(config["seed"])
    rows = random.Random(1).sample(load_rows("test"), 240)

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
        load_adapter(model, arrays.to_torch_state_dict())
        return MetricRecord({"accuracy": accuracy(model, rows)})

    if config["strategy"] == "fedavg":
        strategy = FedAvg(fraction_evaluate=0.0)
    else:
        strategy = as_strategy(config["strategy"], LORA, fraction_evaluate=0.0)
    strategy.start(grid, ArrayRecord(read_adapter(model)), num_rounds=config["rounds"], evaluate_fn=evaluate)
