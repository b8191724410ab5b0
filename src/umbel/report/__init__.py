"""Tables and plots from run directories: the closing table, the terminal's table, one HTML page; and a comparison's.

Reads the files that a run leaves behind (`job.json`, `split.json`, `run.json`, `run.toml`, `rounds.jsonl`, of a comparison
`compare.json` and `compare.toml`) and nothing else, also while the run goes on. Imports neither torch nor transformers;
matplotlib only when a page is drawn.
"""

from umbel.report.closing import as_json, rows
from umbel.report.comparison import comparison_json, comparison_table, rank_notes, read_comparison
from umbel.report.comparison_page import write_comparison
from umbel.report.federated import status_table
from umbel.report.forecast import forecast_table
from umbel.report.jobs import Job, ReportError, Run, read_job
from umbel.report.merged import merged_table, plan_table
from umbel.report.page import write_html
from umbel.report.terminal import by_round, table

__all__ = [
    "Job",
    "ReportError",
    "Run",
    "as_json",
    "by_round",
    "comparison_json",
    "comparison_table",
    "forecast_table",
    "merged_table",
    "plan_table",
    "rank_notes",
    "read_comparison",
    "read_job",
    "rows",
    "status_table",
    "table",
    "write_comparison",
    "write_html",
]
