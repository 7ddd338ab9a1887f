"""The command line: `rapa-dist COMMAND`.

Here errors become exit codes: 0 ok, 1 failed, 2 wrong usage, 130 interrupted. A command returns nothing; it
raises, and never calls `sys.exit`. Nothing here, nor at module level in a command's module, imports torch,
Ray, NumPy or rich.
"""

import contextlib
import errno
import importlib
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from typing import Any

import click

from rapa_dist import __version__
from rapa_dist.cli import standard_streams
from rapa_dist.cli.output import Output, emit_error, tell
from rapa_dist.errors import OutputError, RapaError
from rapa_dist.folders import check_current
from rapa_dist.interrupts import end_like_ctrl_c, notice_no_more
from rapa_dist.leaving import hurry, report_with

COMMANDS = {
    "train": "rapa_dist.cli.train:train",
    "stats": "rapa_dist.cli.stats:stats",
    "runs": "rapa_dist.cli.runs:runs",
    "compare": "rapa_dist.cli.compare:compare",
    "evaluate": "rapa_dist.cli.evaluate:evaluate",
    "analyze": "rapa_dist.cli.analyze:analyze",
    "report": "rapa_dist.cli.report:report",
    "reproduce": "rapa_dist.cli.reproduce:reproduce",
    "plan": "rapa_dist.cli.plan:plan",
    "scale": "rapa_dist.cli.scale:scale",
    "chaos": "rapa_dist.cli.chaos:chaos",
    "doctor": "rapa_dist.cli.doctor:doctor",
}

_ANYWHERE = frozenset({"stats", "plan", "report"})  # they work where the current folder was deleted, too

INTERRUPTED = 130


class CommandLine(click.Group):
    """A group that imports a command when it is named, and turns what a command raises into an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order in which a user meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command of this name; None where there is none."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the named command; a misspelt name gets a suggestion."""
        try:
            name, command, rest = super().resolve_command(ctx, args)
        except click.exceptions.NoSuchCommand as error:
            raise click.exceptions.NoSuchCommand(args[0], possibilities=COMMANDS, ctx=ctx) from error
        if name not in _ANYWHERE and not {"-h", "--help"}.intersection(rest):
            check_current()
        return name, command, rest

    def invoke(self, ctx: click.Context) -> None:
        """Run the command and forget what it returns: only an exit code set on purpose counts."""
        super().invoke(ctx)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command line and leave with its exit code."""
        prog_name = prog_name or "rapa-dist"
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        arguments = list(sys.argv[1:] if args is None else args)
        self._main_shell_completion(extra, prog_name, complete_var)
        output = Output()
        standard_streams.prepare()
        end_like_ctrl_c()
        as_json = "--json" in arguments  # as a mistake may keep click from getting so far
        report_with(partial(_report, output=output if as_json else None))
        try:
            try:
                with self.make_context(prog_name, arguments, obj=output, **extra) as ctx:
                    self.invoke(ctx)
                code = 0
            except click.exceptions.Exit as leave:
                code = leave.exit_code
            except BaseException as error:  # noqa: BLE001 — the one place where an error becomes an exit code
                code = _report(error, output if as_json else None)
        except KeyboardInterrupt:  # another one, while the first was told
            code = INTERRUPTED
        notice_no_more()
        hurry(code)
        sys.exit(code)


def _report(error: BaseException, output: Output | None) -> int:
    """Say on stderr, and on a JSON output, what went wrong; return the exit code."""
    kind, message = type(error).__name__, str(error)
    match error:
        case OutputError():
            if not error.expected:
                tell(f"Error: {message}")
            return error.exit_code
        case RapaError():
            code = error.exit_code
            tell(f"Error: {message}")
        case click.ClickException():
            code, message = error.exit_code, error.format_message()
            error.show()
        case click.Abort() | KeyboardInterrupt():
            code, kind, message = INTERRUPTED, "Interrupted", "interrupted"
            tell("\nInterrupted.")
        case OSError(errno=errno.ENOSPC | errno.EDQUOT | errno.EFBIG | errno.EROFS):
            code, message = (
                1,
                f"{error.filename or 'A file'} can't be written: {error.strerror}. Make room for it there.",
            )
            tell(f"Error: {message}")
        case _:
            code = 1
            traceback.print_exception(error)
            tell(
                "This is a fault in rapa-dist. Please report it to its maintainers with the lines above, the "
                "command line, and what `rapa-dist doctor --json` prints."
            )
    if output is not None:
        with contextlib.suppress(OutputError):
            emit_error(kind, message, output)
    return code


@click.group(
    name="rapa-dist",
    cls=CommandLine,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="rapa-dist", message="%(prog)s %(version)s")
def main() -> None:
    """Train RAPA ConvNets on analog tiles, each a Ray actor in a process of its own.

    Data goes to stdout, progress and messages to stderr. Exit codes: 0 ok, 1 failed, 2 wrong usage,
    130 interrupted.
    """
