"""How far a federation's job is, for the terminal."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Group


def status_table(told: dict[str, Any]) -> "Group":
    """Returns what `umbel.federation.status` told as two tables: the job's runs, and the sites."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    runs = Table(title=f"{told['folder']}: Flower's run {told['number']} is {told['flower']}", title_justify="left", box=None)
    for heading in ("run", "state", "rounds", "answered last", "left out last, or why it ended"):
        runs.add_column(heading, overflow="fold")
    for label, own in told["members"].items():
        why = own.get("error") or "; ".join(f"client {x['client']}: {x['reason']}" for x in own.get("refused", []))
        rounds = f"{own['rounds']} of {own['of']}" if "of" in own else ""
        answered = ", ".join(map(str, own.get("answered", [])))
        runs.add_row(*map(Text, (label, str(own["state"]), rounds, answered, why)))
    sites = Table(title="Sites", title_justify="left", box=None)
    for heading in ("client", "site", "key", "connection"):
        sites.add_column(heading)
    for site in told["sites"]:
        sites.add_row(*map(Text, (str(site["number"]), site["name"], site["state"], site["status"])))
    return Group(runs, Text(""), sites)
