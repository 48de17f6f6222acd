"""The command `gensr`: arguments, help and output of the verbs, which are plain functions elsewhere.

Exit code 0, or 1 with what, where and the fix on stderr (75: stopped by a signal and saved; run it again,
training with --resume auto). Nothing heavy is imported before a verb needs it. Under a launcher only rank 0
prints.
"""

import gc
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from typer.core import TyperCommand, TyperGroup

from data_shards.progress import StageProgress
from trainer.cli import completion
from trainer.errors import ConfigError, GensrError, out_of_memory
from trainer.runtime.progress import clear_bar, show_stages, wrapped

if TYPE_CHECKING:
    from trainer.experiments.submit import Submission

SPLITS = ("train", "valid", "test")
RANK = int(os.environ.get("RANK", "0"))
OURS = ("gensr", "trainer", "data_shards", "ds_configs", "slurm")
Verb = Callable[..., Any]


def as_help_shows_them(parameters: list[Any]) -> list[Any]:
    """Arguments in capitals, flags without a type: typer writes {run}, and <bool> after each --flag."""
    for parameter in parameters:
        if parameter.metavar is None and parameter.param_type_name == "argument":
            parameter.metavar = parameter.name.upper()
        elif parameter.metavar is None and parameter.is_flag:
            parameter.metavar = ""
    return parameters


class Command(TyperCommand):
    def invoke(self, ctx: Any) -> Any:
        gc.enable()  # main() stopped it
        return super().invoke(ctx)

    def get_params(self, ctx: Any) -> Any:
        return as_help_shows_them(super().get_params(ctx))

    def collect_usage_pieces(self, ctx: Any) -> Any:
        """`RUN [KEY=VALUE]...`; typer writes {RUN}, and adds dots to a name that already has some."""
        pieces = super().collect_usage_pieces(ctx)
        return [re.sub(r"^\{(.*?)\}(\.\.\.)?$", _without_braces, piece) for piece in pieces]


def _without_braces(piece: re.Match[str]) -> str:
    name, dots = piece[1], piece[2] or ""
    return name if "..." in name else name + dots


class Group(TyperGroup):
    def get_params(self, ctx: Any) -> Any:
        return as_help_shows_them(super().get_params(ctx))


class Commands(typer.Typer):
    """Verbs whose help is their docstring without the source's line breaks, which a list of verbs would
    print."""

    def __init__(self, **options: Any) -> None:
        super().__init__(cls=Group, **options)

    def command(self, name: str | None = None, **options: Any) -> Any:
        options.setdefault("cls", Command)

        def add(function: Verb) -> Verb:
            paragraphs = cleandoc(function.__doc__ or "").split("\n\n")
            text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
            return super(Commands, self).command(name, help=text, **options)(function)

        return add


app = Commands(
    name="gensr",
    help="GenSR: one generative model for search and recommendation, from raw logs to a registered model.",
    epilog="Example: gensr demo",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
config_app = Commands(
    help="Show configurations.", epilog="Example: gensr config show demo", no_args_is_help=True
)
app.add_typer(config_app, name="config")
runs_app = Commands(
    help="Several runs at once.", epilog="Example: gensr runs summarize runs/sweep", no_args_is_help=True
)
app.add_typer(runs_app, name="runs")
bench_app = Commands(
    help="Measure speed and memory against fair baselines.",
    epilog="Example: gensr bench data",
    no_args_is_help=True,
)
app.add_typer(bench_app, name="bench")

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="settings; gensr config keys lists them all",
        show_default=False,
        autocompletion=completion.keys,
    ),
]
Preset = Annotated[
    str,
    typer.Argument(
        metavar="PRESET|FILE",
        help="a preset's name, a model's (its defaults), or a YAML file (RUN/config.yaml repeats a run)",
        autocompletion=completion.presets,
    ),
]
MaybePreset = Annotated[
    str | None,
    typer.Argument(
        metavar="PRESET|FILE",
        help="if omitted: the defaults",
        show_default=False,
        autocompletion=completion.presets_and_keys,
    ),
]
Retriever = Annotated[
    str | None,
    typer.Option(
        "--retriever",
        metavar="RUN",
        help="run folder of another model whose best items are also ranked; '' for none; "
        "default: serving.retriever, or the version's own",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")]


def main() -> None:
    """Entry point of `gensr` and `python -m trainer`. --debug anywhere keeps a user error's traceback."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    gc.disable()  # declaring the verbs leaves no garbage; looking for it takes a tenth of --help
    try:
        try:
            app(args=arguments, prog_name="gensr")
        except Exception as error:
            if problem := out_of_memory(error):
                raise problem from error
            raise
    except GensrError as error:
        clear_bar()
        if len(arguments) < len(sys.argv) - 1:
            raise
        if RANK == 0:
            typer.echo(f"gensr: {error}", err=True)
        elif not isinstance(error, ConfigError):
            # every rank finds the same mistakes in a configuration; other errors may be one rank's own
            typer.echo(f"gensr: rank {RANK}: {error}", err=True)
        sys.exit(1)
    except ModuleNotFoundError as error:
        if len(arguments) < len(sys.argv) - 1 or (error.name or "").split(".")[0] in OURS:
            raise
        typer.echo(f"gensr: {lacking(error.name or '')}", err=True)
        sys.exit(1)
    except SystemExit as stop:  # click says 2 for wrong usage; here every failure is 1
        sys.exit(1 if stop.code == 2 else stop.code)
    finally:
        gc.enable()  # for whoever called main() from Python


def lacking(package: str) -> str:
    """What to install if a package is missing: gensr's extras leave out what a machine does not need."""
    extras = _extras_with(package.partition(".")[0])
    fix = " or ".join(f"pip install 'gensr[{extra}]'" for extra in extras) or "make install"
    return f"this installation lacks the package {package}, which this needs. Install it with: {fix}"


def _extras_with(package: str) -> list[str]:
    """The extras of gensr that list a package; [] if none does, or if its name is not that of its module."""
    from importlib import metadata  # 40 ms, which --help does not need

    try:
        requirements = metadata.requires("gensr") or []
    except metadata.PackageNotFoundError:  # run from the sources
        return []
    pattern = re.compile(rf"{re.escape(package)}\b.*extra == ['\"](\w+)['\"]", re.IGNORECASE)
    return [match[1] for text in requirements if (match := pattern.match(text)) and match[1] != "dev"]


def show_version(asked: bool) -> None:
    if asked:
        from trainer import __version__

        typer.echo(f"gensr {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="show the version", callback=show_version, is_eager=True)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="show the traceback of errors; works anywhere")
    ] = False,
) -> None:
    """Read by main(), before the verb."""


def verb(example: str, **options: Any) -> Callable[[Verb], Verb]:
    added: Callable[[Verb], Verb] = app.command(epilog=f"Example: {example}", **options)
    return added


def say(*lines: str) -> None:
    """Progress and answers for people."""
    if RANK == 0:
        clear_bar()
        for line in lines:
            typer.echo(line)


def note(line: str) -> None:
    """Remarks for people, on stderr; stdout is for answers."""
    if RANK == 0:
        clear_bar()
        typer.echo(line, err=True)


Jobs = Annotated[
    int, typer.Option(help="runs at once on this machine; they share its cores or get a GPU each", min=1)
]

GpusOfJobs = Annotated[int, typer.Option("--gpus-per-node", help="with --submit; 0 trains on CPU", min=0)]


def refuse_jobs_of_arrays(jobs: int, submit: bool) -> None:
    if submit and jobs > 1:
        raise ConfigError(
            "--jobs is for runs on this machine; with --submit SLURM decides how many run at once. "
            "Leave one of them out"
        )


@contextmanager
def resumable() -> Iterator[None]:
    """A verb stopped in here by Ctrl-C or SIGTERM exits with code 75 and says how to continue."""
    try:
        yield
    except KeyboardInterrupt:
        note("stopped; what is done stays, and the same command resumes")
        raise typer.Exit(75) from None


def answer(document: Any, as_json: bool, *lines: str) -> None:
    """One JSON object for scripts, or lines for people."""
    if RANK == 0:
        clear_bar()
        typer.echo(json.dumps(document, ensure_ascii=False) if as_json else "\n".join(lines))


def fitting(lines: Iterable[str], indent: int, stream: TextIO | None = None) -> list[str]:
    """Lines broken between words if the stream (stdout) is a narrower terminal; commands to be copied do not
    go through here."""
    if not (stream or sys.stdout).isatty():
        return list(lines)
    width = shutil.get_terminal_size().columns
    return [part for line in lines for part in wrapped(line, width, indent) or [""]]


def quoted(path: str | Path) -> str:
    """A path as a word of a command to be copied."""
    return shlex.quote(str(path))


def next_steps(*commands: str) -> list[str]:
    """What people do after a verb; commands that are "" are left out. Paths in them should be quoted()."""
    kept = [command for command in commands if command]
    return [f"{'next' if number == 0 else '':<8}{command}" for number, command in enumerate(kept)]


def preset_and_settings(preset: str | None, overrides: list[str] | None) -> tuple[str | None, list[str]]:
    """If the preset may be left out, the first word may be a setting."""
    settings = overrides or []
    return (None, [preset, *settings]) if preset is not None and "=" in preset else (preset, settings)


def own_command() -> str:
    """This command, for the scripts that it makes; secrets in it are masked."""
    from data_shards.secrets import mask_secrets

    return shlex.join(["gensr", *map(mask_secrets, sys.argv[1:])])


def job_lines(submission: "Submission", ids: Iterable[str]) -> list[str]:
    """Jobs that were submitted, with their scripts."""
    return [f"job {job_id}  {job.path}" for job_id, job in zip(ids, submission.jobs, strict=True)]


def submitted(submission: "Submission", ids: list[str]) -> dict[str, Any]:
    """The same as a document."""
    return {
        "job_ids": ids,
        "runs": [str(path) for path in submission.run_dirs],
        "scripts": [str(job.path) for job in submission.jobs],
    }


def stage_lines() -> StageProgress:
    return show_stages(enabled=RANK == 0)
