"""What a comparison found, as one JSON file that is checked in: the table, every run, and where it was made.

python benchmarks/methods/collect.py runs/clinc150 benchmarks/methods/results/clinc150.json
"""

import argparse
import json
import tomllib
from pathlib import Path
from typing import Any

from umbel import report
from umbel.record import write_json
from umbel.report import Run

KEPT = ("umbel", "versions", "machine", "model", "data")
LEFT_OUT = ("by_client", "job", "scores", "kind", "error", "rounds_planned", "clients", "state", "options", "method")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="that umbel compare made")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    comparison = report.read_comparison(arguments.folder)
    told = report.comparison_json(comparison)
    told["runs"] = [{key: x for key, x in row.items() if key not in LEFT_OUT} for row in told["runs"]]
    first = next(iter(comparison.jobs.values())).methods[0]
    told["provenance"] = {key: first.info[key] for key in KEPT if key in first.info}
    told["file"] = tomllib.loads((arguments.folder / "compare.toml").read_text(encoding="utf-8"))
    # Where the rows lay is nobody's business; their hashes say which they are.
    told["file"]["data"] |= {key: Path(told["file"]["data"][key]).name for key in ("train", "test")}
    told["errors"] = [
        {"label": run.label, "seed": seed, **errors(run)} for seed, job in comparison.jobs.items() for run in job.methods
    ]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out, told)
    print(json.dumps({"rows": len(told["rows"]), "runs": len(told["runs"]), "out": str(arguments.out)}))


def errors(run: Run) -> dict[str, Any]:
    """Returns per training round the aggregation error in the mean over layers: to the weighted mean, and to the sum."""

    def mean(line: dict[str, Any], key: str) -> float | None:
        values = list((line.get(key) or {}).values())
        return sum(values) / len(values) if values else None

    return {
        "to_mean": [mean(line, "aggregation_error") for line in run.trained],
        "to_sum": [mean(line, "aggregation_error_of_sum") for line in run.trained],
        "rank": [mean(line, "rank") for line in run.trained],
    }


if __name__ == "__main__":
    main()
