"""The command line. Heavy imports happen inside commands, so that `umbel --help` answers at once."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from umbel import cli_federation

app = typer.Typer(
    name="umbel",
    help="Federated LoRA fine-tuning of language models: adapters aggregated right, and the error said out loud.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_federation.kit_app, name="kit")
app.add_typer(cli_federation.server_app, name="server")
app.add_typer(cli_federation.site_app, name="site")


@app.callback(invoke_without_command=True)
def main_options(
    version: Annotated[bool, typer.Option("--version", help="Print the version, which sites and server share.")] = False,
) -> None:
    """Federated LoRA fine-tuning of language models: adapters aggregated right, and the error said out loud."""
    if version:
        from umbel import __version__

        typer.echo(f"umbel {__version__}")
        raise typer.Exit


JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
SetFlag = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the file.")]

JobFolder = Annotated[Path, typer.Argument(help="The folder that `umbel run --engine flower` named.")]

ENGINES = ("local", "ray", "flower", "files")

WRONG_INPUT = ("ConfigError", "FolderError", "MergeError", "MethodError", "RecordError", "ReportError")
WRONG_INPUT += ("LedgerError", "PrivacyError")
"""Exceptions of ours that the user can do something about."""

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
"""Exit codes: the user's input is wrong; the run failed; Ctrl-C."""


@app.command()
def run(
    file: Annotated[Path | None, typer.Argument(help="A TOML file, e.g. examples/quickstart.toml.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results; runs/<file's name> if not given.")] = None,
    resume: Annotated[Path | None, typer.Option(metavar="DIR", help="Go on with a run that stopped.")] = None,
    engine: Annotated[
        str,
        typer.Option(
            help="Where clients are: local (this process), ray (processes of this machine), flower (a federation), "
            "files (sites that no network reaches)."
        ),
    ] = "local",
    server: Annotated[
        Path | None,
        typer.Option("--federation", metavar="DIR", help="For flower and files: the kit's server folder, kit/server."),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="For flower: submit and come back at once.")] = False,
    close: Annotated[
        bool, typer.Option("--close", help="For --resume of a run by files: go on without those who are missing; quorum holds.")
    ] = False,
    assignments: SetFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Federate: train every method of the file; in one process with central and local baselines beside them."""
    with _errors():
        from umbel import config
        from umbel import run as running

        _find_own_modules()
        if (file is None) == (resume is None):
            raise config.ConfigError("give a TOML file, or --resume DIR; one of the two")
        if resume is not None and out is not None:
            raise config.ConfigError("--resume goes on in the run's own folder; --out is not for it")
        if resume is not None and assignments:
            running.adjust(resume, assignments)
        folder = resume or out or running.free_folder(Path("runs") / (file or Path()).stem)
        table = None if file is None else config.read(file, assignments)
        if resume is None and running.is_job(folder):
            raise config.ConfigError(f"{folder} holds a run already; `umbel run --resume {folder}`, or give another --out")
        if engine not in ENGINES:
            raise config.ConfigError(f"--engine: got {engine!r}, allowed: {', '.join(ENGINES)}")
        if (resume / "federation.json").is_file() if resume is not None else engine == "flower":
            _run_federated(table, folder, server, detach, as_json)
            return
        if (resume / "offline.json").is_file() if resume is not None else engine == "files":
            _run_offline(table, folder, server, close, as_json)
            return
        if close:
            raise config.ConfigError("--close is for --resume of a run that began with --engine files")
        if server is not None or detach:
            raise config.ConfigError("--federation is for --engine flower and files, --detach for flower")
        try:
            with _listening(as_json) as listen:
                if engine == "ray":
                    _simulate(table, folder, listen)
                else:
                    folder = running.resume(folder, listen) if table is None else running.run(table, folder, listen)
        except KeyboardInterrupt:
            kept = running.is_job(folder)
            how = f"Finished rounds are kept; go on with: umbel run --resume {folder}" if kept else "Nothing had begun."
            typer.echo(f"Stopped. {how}", err=True)
            raise typer.Exit(INTERRUPTED) from None
        _print_result(folder, as_json)


def _print_result(folder: Path, as_json: bool) -> None:
    from umbel import report

    page = report.write_html([report.read_job(folder)], folder / "report.html")
    _print_report([folder], as_json)
    if not as_json:
        typer.echo(f"Report: {page}")
        for label, place in _adapters(folder).items():
            typer.echo(f"Adapter of {label}: {place}")


def _simulate(table: dict[str, Any] | None, folder: Path, listen: Callable[[dict[str, Any]], None]) -> None:
    from umbel import app as flower_app
    from umbel import config

    flower_app.simulate(table or config.read(folder / "job.toml"), folder, listen)


def _run_federated(table: dict[str, Any] | None, folder: Path, server: Path | None, detach: bool, as_json: bool) -> None:
    """Submits a job, or submits it again to go on where it stopped, and follows it; Ctrl-C only stops looking."""
    from umbel import config, federation

    if table is None:
        server = server or federation.find(folder, submitted=False).federation.folder
        table = federation.table_of(folder)
        if federation.is_done(folder):
            _print_result(folder, as_json)
            return
    if server is None:
        raise config.ConfigError(
            "--engine flower needs --federation DIR, the kit's server folder (see `umbel kit init --help`)"
        )
    config.configs(table)  # what is wrong with it is said here and not in a log at the server
    # A second submission of a job that runs would find its folder taken, and what was noted of the first would be lost.
    runs = federation.is_federated(folder) and federation.at_work(folder)
    submitted = federation.find(folder) if runs else federation.submit(table, folder, server)
    how = f"look: umbel status {folder} · umbel log {folder} · end it: umbel stop {folder}"
    if not as_json:
        done = "It is running already" if runs else f"Submitted to {submitted.federation.server}"
        typer.echo(f"{done} as Flower's run {submitted.number}; {how}", err=True)
    if detach:
        return
    try:
        with _listening(as_json) as listen:
            federation.follow(submitted, listen)
    except KeyboardInterrupt:
        typer.echo(f"Detached; the run goes on. {how[0].upper()}{how[1:]}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    _print_result(folder, as_json)


def _run_offline(table: dict[str, Any] | None, folder: Path, server: Path | None, close: bool, as_json: bool) -> None:
    """Begins a run whose requests and replies are carried, or goes on with it; ends where somebody has to carry."""
    from umbel import config, offline

    if close and table is not None:
        raise config.ConfigError("--close is for --resume of a run that began with --engine files")
    if close:
        cli_federation.tell_closed(offline.close(folder))

    def go() -> Path:
        with _listening(as_json) as listen:
            if table is None:
                return offline.go_on(folder, listen, server)
            if server is None:
                raise config.ConfigError(
                    "--engine files needs --federation DIR, the kit's server folder (`umbel kit init` makes it)"
                )
            return offline.begin(table, folder, server, listen)

    cli_federation.carry(go, folder, as_json)


@app.command()
def status(folder: JobFolder, as_json: JsonFlag = False) -> None:
    """Say how far a job of a federation is, and which sites are connected."""
    with _errors():
        from umbel import federation, offline, report

        if offline.is_offline(folder):
            _offline_status(folder, as_json)
            return
        told = federation.status(federation.find(folder))
        if as_json:
            typer.echo(json.dumps(told))
        else:
            _console().print(report.status_table(told))


def _offline_status(folder: Path, as_json: bool) -> None:
    from umbel import offline

    asked = offline.waiting(folder)
    if as_json:
        typer.echo(json.dumps({"asked": asked}))
    elif asked:
        cli_federation.tell_waiting(folder, asked)
    else:
        typer.echo(f"Nobody is waited for. Go on, or see the table: umbel run --resume {folder}")


@app.command()
def log(folder: JobFolder, as_json: JsonFlag = False) -> None:
    """Print what has happened in a job of a federation: rounds, who answered, who was refused and why."""
    with _errors():
        from umbel import federation

        federation.find(folder)
        for event in federation.events(folder):
            typer.echo(json.dumps(event) if as_json else federation.say(event))


@app.command()
def stop(folder: JobFolder) -> None:
    """End a job of a federation; finished rounds are kept."""
    with _errors():
        from umbel import federation

        federation.stop(federation.find(folder))
        typer.echo(f"Stopped. Finished rounds are kept; go on with: umbel run --resume {folder}")


@app.command()
def plan(
    file: Annotated[Path, typer.Argument(help="The TOML file of a run, e.g. examples/quickstart.toml.")],
    link: Annotated[str, typer.Option(metavar="SPEED", help="A site's connection, e.g. 20Mbit or 10MB/s.")] = "",
    clients: Annotated[int | None, typer.Option(min=1, metavar="N", help="In place of split.clients.")] = None,
    assignments: SetFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Say what a run will send and need, by method, before anything starts; reads no weights."""
    with _errors():
        from umbel import config, planning, report

        _find_own_modules()
        told = planning.plan(config.read(file, assignments), clients, link)
        if as_json:
            typer.echo(json.dumps(told))
        else:
            _console().print(report.forecast_table(told))


@app.command()
def compare(
    file: Annotated[Path, typer.Argument(help="A TOML file with [compare], e.g. examples/compare.toml.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the results; runs/<file's name> if not given.")] = None,
    assignments: SetFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Compare methods over several seeds, something held equal; the same command again goes on where it stopped."""
    with _errors():
        from umbel import compare as comparing
        from umbel import config, report

        _find_own_modules()
        folder = out or Path("runs") / file.stem
        table = config.read(file, assignments)
        try:
            with _listening(as_json) as listen:
                comparing.compare(table, folder, listen)
        except KeyboardInterrupt:
            typer.echo("Stopped. Finished rounds are kept; the same command goes on.", err=True)
            raise typer.Exit(INTERRUPTED) from None
        comparison = report.read_comparison(folder)
        told = report.comparison_json(comparison)
        if as_json:
            typer.echo(json.dumps(told))
        else:
            _console().print(report.comparison_table(comparison))
            typer.echo(f"Page: {folder / 'comparison.html'}")
            typer.echo(f"Every run: {folder / 'comparison.csv'}")
        if any(row["state"] != "done" for row in told["runs"]):
            raise typer.Exit(FAILED)


@app.command()
def merge(
    folders: Annotated[list[Path], typer.Argument(help="PEFT folders (adapter_config.json, adapter_model.safetensors).")],
    out: Annotated[Path | None, typer.Option(help="The merged PEFT folder; an older merge there is replaced.")] = None,
    method: Annotated[
        str | None, typer.Option(help="How; florist with energy=1, which is exact, if not given. See `umbel methods`.")
    ] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option of the method, e.g. energy=0.99.")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(metavar="N,N,…", help="One for each folder; num_examples of each umbel.json if not given, else equal."),
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Write this rank in every layer, for servers that want one.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the written tensors: float32, bfloat16, float16 or float64.")] = "float32",
    force: Annotated[bool, typer.Option("--force", help="Take different base models or revisions all the same.")] = False,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Compare what was written with the exact weighted mean of the updates.")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen; write nothing.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Merge finished adapters into one, right for mixed ranks and scales; needs no base model and no GPU."""
    with _errors():
        from umbel import config, merging, report

        _find_own_modules()
        options: dict[str, Any] = {}
        for assignment in assignments or []:
            options = config.override(options, assignment)
        given = None if weights is None else _numbers("--weights", weights)
        asked: dict[str, Any] = {"method": method, "options": options, "weights": given, "rank": rank, "dtype": dtype}
        asked |= {"force": force, "check": check}
        if dry_run:
            told = merging.plan(folders, out=out, **asked)
            table = report.plan_table(told)
        elif out is None:
            raise config.ConfigError("give --out FOLDER, or --dry-run to see what would happen")
        else:
            try:
                with _bar(as_json, "merging {task.description}") as progress:
                    told = merging.merge(folders, out, progress=progress, **asked)
            except KeyboardInterrupt:
                typer.echo("Stopped. Nothing was written.", err=True)
                raise typer.Exit(INTERRUPTED) from None
            table = report.merged_table(told)
        if as_json:
            typer.echo(json.dumps(told))
            return
        _console().print(table)
        if not dry_run:
            typer.echo(f"Adapter: {out}   every layer's numbers: {out}/merge.json")


@app.command(name="report")
def report_command(
    folders: Annotated[list[Path], typer.Argument(help="Folders that `umbel run` made.")],
    out: Annotated[Path | None, typer.Option(help="The page; report.html in the first folder if not given.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Print the table of one or several runs and write report.html."""
    with _errors():
        from umbel import report

        page = report.write_html([report.read_job(folder) for folder in folders], out or folders[0] / "report.html")
        _print_report(folders, as_json)
        if not as_json:
            typer.echo(f"Report: {page}")


@app.command(name="eval")
def eval_command(
    folder: Annotated[Path, typer.Argument(help="A run's folder, with adapter/ inside.")],
    files: Annotated[
        list[Path] | None,
        typer.Option("--config", metavar="FILE", help="A task to score it on in place of its own; repeatable."),
    ] = None,
    assignments: SetFlag = None,
    out: Annotated[Path | None, typer.Option(help="A folder for the scores of every row.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Score a finished run's adapter, loaded from disk with plain PEFT: again, or on other tasks."""
    with _errors():
        from umbel import config
        from umbel import run as running

        if assignments and not files:
            raise config.ConfigError("--set changes keys of the files that --config names; give --config, too")
        tables: dict[str, dict[str, Any]] = {}
        for file in files or []:
            if file.stem in tables:
                raise config.ConfigError(f"--config: two files are called {file.stem!r}, which names their scores; rename one")
            tables[file.stem] = config.read(file, assignments)
        with _bar(as_json, "scoring {task.description}") as progress:
            if files:
                scores = running.evaluate_on(folder, tables, out, progress)
            else:
                kept = out and out / "scores.jsonl"
                scores = running.evaluate_again(folder, kept, lambda done, total: progress("", done, total))
        if as_json:
            typer.echo(json.dumps(scores))
        elif files:
            _console().print(_task_table(scores))
        else:
            _show([(name, _number(value)) for name, value in scores.items()])


@app.command()
def methods(
    as_json: JsonFlag = False,
    privacy: Annotated[
        bool, typer.Option("--privacy", help="What each sends, and what of it the server can be kept from.")
    ] = False,
) -> None:
    """Print what each method can do, measured on a tiny model."""
    with _errors():
        from umbel import method, testing

        if privacy:
            told = {name: testing.disclosures(name) for name in method.names()}
            if as_json:
                typer.echo(json.dumps(told))
            else:
                _console().print(_privacy_table(testing.privacy_table(told)))
            return
        found = {name: testing.capabilities(name) for name in method.names()}
        if as_json:
            typer.echo(json.dumps(found))
        else:
            _console().print(_capability_table(found))


@app.command()
def privacy(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A ledger, a site's folder, or a run's.")],
    as_json: JsonFlag = False,
) -> None:
    """Print what differential privacy has spent: ε and δ by run and in all, what one more round costs, how many are left."""
    with _errors():
        from umbel import ledger

        told = [ledger.summary(ledger.Ledger(place)) for place in ledger.find(folder)]
        if as_json:
            typer.echo(json.dumps(told))
        else:
            _console().print(_ledger_table(told, folder))


@app.command()
def check(
    name: Annotated[str, typer.Argument(help="A method's name, or my_package.my_method.")], as_json: JsonFlag = False
) -> None:
    """Run the conformance suite on a method, ours or yours."""
    with _errors():
        from umbel import testing

        _find_own_modules()
        try:
            results = testing.check_method(name)
        except testing.NonConforming as error:
            results = error.results
        if as_json:
            typer.echo(json.dumps([vars(result) for result in results]))
        else:
            _console().print(_check_table(results))
        if any(result.holds is False for result in results):
            raise typer.Exit(FAILED)


def main() -> None:
    """Entry point of the `umbel` command."""
    # Threads that spin long while they wait make training several times slower as soon as anything else runs on the
    # machine; a short spin costs nothing on a quiet one. Read when torch is first imported; a user's own setting wins.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    app()


# What the commands share


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Turns our own exceptions into one line and an exit code; anything else is a bug and keeps its traceback."""
    try:
        yield
    except Exception as error:
        kind = type(error).__name__
        module = type(error).__module__
        if not module.startswith("umbel.") and not isinstance(error, OSError):
            raise
        wrong_input = kind in WRONG_INPUT or isinstance(error, OSError)
        typer.echo(f"umbel: {error}", err=True)
        raise typer.Exit(BAD_INPUT if wrong_input else FAILED) from None


def _find_own_modules() -> None:
    """Lets my_package/my_method.py lie in the working directory; last, so that it hides no installed package."""
    if "" not in sys.path:
        sys.path.append("")


def _console() -> Any:
    from rich.console import Console

    return Console()


def _show(rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        typer.echo(f"{name:<{width}}  {value}")


def _print_report(folders: list[Path], as_json: bool) -> None:
    from umbel import report

    jobs = [report.read_job(folder) for folder in folders]
    if as_json:
        typer.echo(json.dumps(report.as_json(jobs)))
    else:
        _console().print(report.by_round(jobs))
        _console().print()
        _console().print(report.table(jobs))


def _adapters(folder: Path) -> dict[str, Path]:
    contents = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    return {label: folder / contents["members"][label] / "adapter" for label in contents["methods"]}


@contextlib.contextmanager
def _listening(quiet: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yields the listener that draws progress: the whole job with the time left, and the round that runs."""
    if quiet:
        yield lambda event: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield _Drawing(progress, console)


class _Drawing:
    """Turns events into two bars: runs of the job, and client-rounds (with steps as fractions) of the current run."""

    def __init__(self, progress: Any, console: Any) -> None:
        self.progress, self.console = progress, console
        self.job = progress.add_task("starting", total=None)
        self.run = progress.add_task("", total=None, visible=False)
        self.clients = self.rounds = 1

    def __call__(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "stage":
            self.progress.update(self.job, description=event["text"])
        elif kind == "note":
            self.console.print(event["text"], markup=False, highlight=False)
        elif kind == "refused":
            who = f"client {event['client']}" + (f" ({event['site']})" if "site" in event else "")
            text = f"round {event['round']}: left out {who}: {event['reason']}"
            self.console.print(text, markup=False, highlight=False)
        elif kind == "split":
            self.console.print(_split_table(event["manifest"]))
        elif kind == "member":
            text = f"run {event['label']}"
            self.progress.update(self.job, description=text, completed=event["index"], total=event["members"])
            self.progress.reset(self.run, total=None, visible=True, description="opening")
        elif kind == "step":
            task = self.progress.tasks[self.run]
            done = int(task.completed) + event["step"] / event["steps"] * 0.999
            self.progress.update(self.run, completed=done)
        elif kind == "round":
            self._round(event)

    def _round(self, event: dict[str, Any]) -> None:
        total = event["rounds"] * event["clients"]
        over = {"train": event["answered"] - event["clients"], "update": 0}  # clients of this round that are yet to train
        done = event["round"] * event["clients"] + over[event["phase"]] if event["phase"] in over else 0
        text = f"  round {event['round']} of {event['rounds']}, client {event['client']}"
        self.progress.update(self.run, description=text, completed=done, total=total)


def _numbers(flag: str, text: str) -> list[float]:
    from umbel.config import ConfigError

    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise ConfigError(f"{flag} takes numbers with commas between them, as 1200,800,400; got {text!r}") from None


@contextlib.contextmanager
def _bar(quiet: bool, text: str) -> Iterator[Callable[[str, int, int], None]]:
    """Yields what draws a bar on stderr: called with what was done last, how many are done, and of how many."""
    if quiet:
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(text, markup=False), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=None)
        yield lambda what, done, total: progress.update(bar, description=what, completed=done, total=total)


def _task_table(scores: dict[str, dict[str, Any]]) -> Any:
    from rich.table import Table

    names = list(dict.fromkeys(name for own in scores.values() for name in own))
    table = Table(box=None)
    table.add_column("task")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for task, own in scores.items():
        table.add_row(task, *(_number(own[name]) if name in own else "" for name in names))
    return table


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _split_table(manifest: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title=f"Who owns which rows ({manifest['kind']})", title_justify="left")
    table.add_column("client", justify="right")
    table.add_column("train", justify="right")
    table.add_column("test", justify="right")
    table.add_column("labels", justify="right")
    table.add_column("most of its training rows", overflow="fold")
    for client, (train, test) in enumerate(zip(manifest["train"], manifest["test"])):
        order = sorted(range(len(train)), key=lambda i: -train[i])
        most = ", ".join(f"{manifest['labels'][i]} {train[i]}" for i in order[:3] if train[i])
        name = f"{client} (unseen)" if client in manifest.get("unseen", []) else str(client)
        table.add_row(name, str(sum(train)), str(sum(test)), str(sum(n > 0 for n in train)), most)
    return table


def _ledger_table(told: list[dict[str, Any]], folder: Path) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="Spent, for each ledger", title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("run", overflow="fold")
    for heading in ("client", "rounds", "σ", "q", "steps", "clip", "ε", "δ", "of"):
        table.add_column(heading, justify="right", no_wrap=True)
    for own in told:
        place = Path(own["ledger"])
        inside = place.relative_to(folder) if place.is_relative_to(folder) and place != folder else place
        table.add_row(escape(str(inside).removesuffix("/ledger")), style="bold")
        for run in own["runs"]:
            noise = ["\n".join(f"{x[key]:.4g}" for x in run["spent"]) for key in ("sigma", "sample_rate", "steps")]
            counts = str(run["client"]), str(run["rounds"])
            spent = f"{run['max_grad_norm']:g}", f"{run['epsilon']:.4g}", f"{run['delta']:.2g}", f"{run['target']:g}"
            job, _, label = run["run"].partition("/")  # the job's whole id is in --json
            table.add_row(escape(f"{job[:6]}…/{label}" if len(job) > 6 and label else run["run"]), *counts, *noise, *spent)
        if own["runs"]:
            table.add_row("in all", *[""] * 6, f"{own['epsilon']:.4g}", f"{own['delta']:.2g}", f"{own['budget']:g}")
        if own["next"] is not None:
            left = f"one more ({own['next']['left'] or 'none'} left)"
            table.add_row(left, *[""] * 6, f"{own['next']['epsilon']:.4g}", "", "", end_section=True)
    units = {own["unit"]: own for own in told}
    rules = [f"ε is for {unit}. Neighbours: {own['neighbours']}. Sampling: {own['sampling']}." for unit, own in units.items()]
    more = (
        "In all: runs that share any of the data. One more: after another round of the last run. A start that was measured on "
        "private rows is the first σ of its run."
    )
    table.caption = " ".join([*rules, more])
    table.caption_justify = "left"
    return table


def _capability_table(found: dict[str, dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(
        title="Methods, measured on invented clients and a 64 × 48 layer of rank 3. Bytes are per layer, client and round; "
        "server memory is the method's own (the aggregation error of methods that send A and B keeps their uploads besides)",
        title_justify="left",
        box=None,
    )
    table.add_column("method", no_wrap=True)
    for heading in ("exact", "error", "bytes\nup", "bytes\ndown", "start\nup/down", "mask-\nable", "mixed\nranks"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("server\nmemory", no_wrap=True)
    for name, own in found.items():
        cells = [own[key] for key in ("exact", "error", "bytes_up", "bytes_down")]
        start = f"{own['start_bytes_up']}/{own['start_bytes_down']}" if own["start_bytes_down"] else ""
        memory = own["server_memory"].removesuffix(" with clients")
        cells += [start, own["maskable"], own["mixed_ranks"], memory]
        table.add_row(name, *map(_cell, cells))
    return table


def _privacy_table(rows: list[list[str]]) -> Any:
    from rich.table import Table

    table = Table(
        title="What methods send, in numbers for a 64 × 48 layer of rank 3, and who can read it", title_justify="left"
    )
    for heading in rows[0]:
        table.add_column(heading, overflow="fold")
    for row in rows[1:]:
        table.add_row(*row)
    return table


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.1e}"
    return str(value)


def _check_table(results: list[Any]) -> Any:
    from rich.table import Table

    table = Table(box=None)
    for heading in ("", "phase", "property", "measured"):
        table.add_column(heading, overflow="fold")
    signs = {True: "[green]yes[/]", False: "[bold red]NO[/]", None: "[dim]–[/]"}
    for result in results:
        table.add_row(signs[result.holds], result.phase, result.claim, result.detail)
    return table


if __name__ == "__main__":
    main()
