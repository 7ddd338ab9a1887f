"""`rapa-dist doctor`: what this machine has, what it lacks, and what to do about it."""

from typing import TYPE_CHECKING

import click

from rapa_dist.cli.output import emit, json_option

if TYPE_CHECKING:
    from rapa_dist.doctor import Check

MARKS = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "failed": "[red]failed[/]"}


@click.command(short_help="Check this machine: versions, memory, Ray, data.")
@click.option("--deep", is_flag=True, help="Also start a local Ray with one actor, which takes some seconds.")
@json_option
@click.pass_context
def doctor(ctx: click.Context, deep: bool, as_json: bool) -> None:
    """Check versions, cores, memory, shared memory, Ray, torchvision's operators and the data sets.

    Every line that isn't ok comes with its fix. Exit code 1 where a check failed; warnings don't count.
    """
    from rapa_dist.doctor import examine

    checks = examine(deep=deep)
    failed = sum(check.status == "failed" for check in checks)
    if as_json:
        emit({"ok": not failed, "checks": checks})
    else:
        _show(checks, failed)
    ctx.exit(1 if failed else 0)


def _show(checks: "list[Check]", failed: int) -> None:
    from rich.markup import escape
    from rich.table import Table

    from rapa_dist.console import stdout

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("check", "", "found"):
        table.add_column(column, overflow="fold")
    for check in checks:
        table.add_row(check.name, MARKS[check.status], escape(check.value))
        if check.status != "ok":
            table.add_row("", "", f"[bold]→ {escape(check.fix)}[/]")
    stdout.print(table)
    warnings = sum(check.status == "warning" for check in checks)
    noun = "warning" if warnings == 1 else "warnings"
    stdout.print(f"{len(checks) - failed - warnings} ok, {warnings} {noun}, {failed} failed")
