"""``steadyhelm``: one command per thing that a person asks for.

Exit codes: 0 done · 1 failed · 2 the run file, the data or the command line is wrong · 128 + n ended by signal n
(130: Ctrl-C). Heavy modules are imported inside the commands, so that ``--help`` and ``validate`` need neither torch
nor ray and answer at once.
"""

from __future__ import annotations

import atexit
import logging
import os
import shlex
import sys
import traceback
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from steadyhelm import cli_jobs
from steadyhelm.cli_options import AcceptChanges, Debug, LogFormat, Logs, Quiet, RunId, RunPath, Sets, TakeOver

if TYPE_CHECKING:
    from steadyhelm.config import RunFile

EXIT_FAILED, EXIT_WRONG_INPUT, EXIT_INTERRUPTED, EXIT_SIGNAL = 1, 2, 130, 128

app = typer.Typer(
    name="steadyhelm",
    help="Trains reasoning reward models by reinforcement learning, from a laptop to a cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


RunPlace = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="A run's place, <store>/<run>: a folder or an s3:// URI, as 'steadyhelm run' shows it."
    ),
]
New = Annotated[bool, typer.Option("--new", help="Start a new run, under the first free <id>-<n>.")]
ResumeLast = Annotated[bool, typer.Option("--resume-last", help="Go on with the newest run of this id.")]
Address = Annotated[str, typer.Option(help="Ray cluster to join; default: one of the run's own on this machine.")]


def start(
    context: typer.Context,
    file: RunPath,
    sets: Sets = None,
    run_id: RunId = "",
    new: New = False,
    resume_last: ResumeLast = False,
    take_over: TakeOver = False,
    accept_changes: AcceptChanges = False,
    address: Address = "",
    quiet: Quiet = False,
    log_format: Logs = LogFormat.HUMAN,
    debug: Debug = False,
) -> None:
    """``run`` and ``sft``: the same, but that ``sft`` takes run files of that algorithm only."""
    from steadyhelm import telemetry
    from steadyhelm.display import Display
    from steadyhelm.errors import ConfigError
    from steadyhelm.status import StatusBoard, told_at_the_end

    if new and resume_last:
        raise typer.BadParameter("give one of --new and --resume-last")
    as_json, board = log_format is LogFormat.JSON, StatusBoard()
    with (
        told_at_the_end(board, typer.echo) if as_json else nullcontext(),
        Display(live=False if as_json else None, quiet=quiet or as_json) as display,
    ):
        run_file = _load(file, sets)
        if context.info_name == "sft" and not run_file.is_sft:
            kind = run_file.algorithm.type
            raise ConfigError(f"{file}: algorithm.type is {kind!r}: 'steadyhelm sft' takes 'sft', use 'steadyhelm run'")
        # After the display has begun: a live one moves what is written to stderr above its picture.
        level = logging.WARNING if display.is_live and not debug else _level(debug)
        telemetry.configure(log_format.value, level)
        from steadyhelm import driver

        again = ["steadyhelm", context.info_name or "run", str(file), *(f"--set={item}" for item in sets or ())]
        again += [f"--address={address}"] if address else []
        options = driver.RunOptions(
            command=shlex.join(again),
            run_id=run_id,
            new=new,
            resume_last=resume_last,
            take_over=take_over,
            accept_changes=accept_changes,
            address=address,
        )
        sink = telemetry.log_event if as_json else display.update
        code = driver.run(run_file, file.resolve().parent, options, sink, board)
    raise typer.Exit(code)


app.command("run", help="Starts the run that FILE describes, or goes on with it.")(start)
app.command("sft", help="Supervised fine-tuning: run, for a FILE whose algorithm.type is sft.")(start)


@app.command(name="eval")
def evaluate(
    file: RunPath,
    sets: Sets = None,
    model: Annotated[str, typer.Option(help="Model folder; default: the run file's model.")] = "",
    pairs: Annotated[int, typer.Option(min=0, help="Held-out pairs; 0 takes all.")] = 0,
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    address: Address = "",
    log_format: Logs = LogFormat.HUMAN,
    debug: Debug = False,
) -> None:
    """Evaluates a model on FILE's held-out pairs, in both orders."""
    import json

    from steadyhelm import telemetry
    from steadyhelm.display import evaluation_line

    run_file = _load(file, sets)
    telemetry.configure(log_format.value, _level(debug))
    from steadyhelm import driver

    def told(event: telemetry.Event) -> None:
        if isinstance(event, telemetry.Notice):  # what is waited for; stdout is the result's
            telemetry.log_event(event)

    result = driver.evaluate(run_file, file.resolve().parent, model or None, pairs, address, told)
    typer.echo(json.dumps(result, indent=1) if json_output else evaluation_line(result))


@app.command()
def validate(file: RunPath, sets: Sets = None, debug: Debug = False) -> None:
    """Checks FILE and the code files that it names; prints what it describes."""
    run_file = _load(file, sets)
    iterations, kind = run_file.schedule.iterations, run_file.algorithm.type
    batch = f"{run_file.rollouts_per_iteration} {'traces' if run_file.is_sft else 'rollouts'}"
    steps = iterations * run_file.steps_per_iteration
    typer.echo(f"{file} is valid: {run_file.name}, {kind}, {iterations} iterations of {batch}, {steps} optimiser steps")
    if run_file.model.path and not Path(run_file.model.path).is_dir():
        typer.echo(f"note: model.path {run_file.model.path!r} is no folder yet; it must exist when the run starts")


@app.command()
def schema() -> None:
    """Prints the JSON Schema of run files."""
    import json

    from steadyhelm.config.load import schema as run_file_schema

    typer.echo(json.dumps(run_file_schema(), indent=1))


@app.command()
def report(
    run: RunPlace,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: report/report.html of RUN.")] = None,
    metrics: Annotated[
        bool, typer.Option("--metrics", help="Print RUN's metrics instead, a JSON object for each iteration.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Builds a run's report.html again from what its store holds."""
    from steadyhelm.report import gather, metrics_jsonl, render_report, write_report
    from steadyhelm.store import open_run

    store, name = open_run(run)
    if metrics:
        typer.echo(metrics_jsonl(store, name), nl=False)
        return
    if output is None:
        typer.echo(f"wrote {write_report(store, name)} in {store.uri}")
        return
    page = render_report(gather(store, name))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")
    typer.echo(f"wrote {output}")


@app.command()
def watch(
    run: RunPlace,
    once: Annotated[bool, typer.Option("--once", help="Show where RUN stands and exit.")] = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print JSON, an object on a line for each change.")
    ] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between looks at the store.")] = 5.0,
    debug: Debug = False,
) -> None:
    """Follows RUN out of its store, from anywhere: iterations, engines, decisions, and whether somebody drives it."""
    import json

    from steadyhelm import watch as watching
    from steadyhelm.display import Display
    from steadyhelm.store import open_run

    watcher = watching.Watcher(*open_run(run))
    if once:
        status = watcher.sure()
        typer.echo(json.dumps(status.to_json(), indent=1) if json_output else "\n".join(status.lines()))
    elif json_output:
        watching.follow_json(watcher, typer.echo, every)
    else:
        with Display() as display:
            watching.follow(watcher, display, every)


@app.command(name="gc")
def collect(
    run: RunPlace,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be deleted.")] = False,
    debug: Debug = False,
) -> None:
    """Deletes what no manifest, no resume and no subscriber of RUN can need; not while a driver is at it."""
    from steadyhelm.store import open_run
    from steadyhelm.store.retention import collect as collect_garbage
    from steadyhelm.telemetry import Event, Notice

    def tell(event: Event) -> None:
        if isinstance(event, Notice):
            typer.echo(event.text, err=True)

    store, name = open_run(run)
    found = collect_garbage(store, name, tell, dry_run=dry_run)
    for item in found:
        typer.echo(f"{item.key}  {item.why}")
    objects = "1 object" if len(found) == 1 else f"{len(found)} objects"
    typer.echo(f"would delete {objects}" if dry_run else f"deleted {objects}")


@app.command()
def data(
    file: RunPath,
    sets: Sets = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Pairs to show.")] = 3,
    held_out: Annotated[bool, typer.Option("--eval", help="Show held-out pairs.")] = False,
    debug: Debug = False,
) -> None:
    """Shows the first pairs of FILE's data as user messages.

    In the data set's own order: a run shuffles, swaps responses, and wraps each message in the model's chat template.
    """
    from itertools import islice

    from steadyhelm.data.code_ref import call_code, iterate_result
    from steadyhelm.data.pairs import checked_pairs
    from steadyhelm.data.template import pairwise_prompt
    from steadyhelm.errors import ConfigError

    run_file, base = _load(file, sets), file.resolve().parent
    reference = run_file.data.eval if held_out else run_file.data.train
    if reference is None:
        raise ConfigError(f"{file}: data.eval is not given: add it, or leave --eval out")
    records = iterate_result(base, reference, call_code(base, reference))
    for pair in islice(checked_pairs(records, reference), count):
        parts = (pair.question, *pair.responses)
        template = run_file.data.template
        text = str(call_code(base, template, *parts)) if template else pairwise_prompt(*parts)
        sizes = ", ".join(f"{len(image)} bytes" for image in pair.images) or "none"
        typer.echo(f"── {pair.pair_id} · better: {pair.label} · images: {sizes}\n{text}")
        if pair.trace is not None:
            typer.echo(f"── trace\n{pair.trace}")
        typer.echo()


@app.command()
def version() -> None:
    """Prints the version."""
    from steadyhelm import __version__

    typer.echo(__version__)


cli_jobs.add_to(app)


def _load(file: Path, sets: list[str] | None) -> RunFile:
    from steadyhelm.config.load import load_run_file

    return load_run_file(file, sets or ())


def _level(debug: bool) -> int:
    return logging.DEBUG if debug else logging.INFO


def exit_code(error: BaseException) -> int:
    """The exit code that an error means."""
    from steadyhelm.errors import ConfigError, DataError, ModelError, StoppedError

    if isinstance(error, StoppedError):
        return EXIT_SIGNAL + error.signal
    return EXIT_WRONG_INPUT if isinstance(error, ConfigError | DataError | ModelError) else EXIT_FAILED


def main() -> None:
    """The console script: runs a command, turns errors into one clear line on stderr and an exit code.

    An error that is not ours is a bug and shows its traceback.
    """
    from steadyhelm.errors import SteadyhelmError

    try:
        app()
    except SystemExit as ended:  # as every command does that raises nothing else
        _end(ended.code)
    except KeyboardInterrupt:
        _end(EXIT_INTERRUPTED)
    except Exception as error:  # the outermost frame: whatever it is becomes an exit code
        ours = isinstance(error, SteadyhelmError)
        if "--debug" in sys.argv or not ours:
            _complain(traceback.format_exc().rstrip())
        _complain(f"steadyhelm: {error}" if ours else "steadyhelm: this error is not an expected one: report it")
        _end(exit_code(error))


def _end(code: str | int | None) -> NoReturn:
    """Ends the process as ``sys.exit`` does, but where Ray was in it as ``end_at_once`` does."""
    if "ray" not in sys.modules or isinstance(code, str):
        sys.exit(code)
    end_at_once(code or 0)


def end_at_once(code: int) -> NoReturn:
    """Ends the process right behind its exit functions.

    Threads of Ray, gRPC and gloo would go on while Python and C++ take apart what they use, which now and then is a
    segmentation fault or an abort behind work that has succeeded.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # nobody reads it any more, or it is closed
            stream.flush()
    os._exit(code)


def _complain(text: str) -> None:
    """Prints to stderr without the secrets of the environment: a message may quote a user's code or a URL."""
    from steadyhelm.telemetry.logs import redact, secret_values

    print(redact(text, secret_values(os.environ)), file=sys.stderr)


if __name__ == "__main__":
    main()
