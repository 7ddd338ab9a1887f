"""What a person sees of a run: a live line on a terminal, one plain line per epoch elsewhere."""

import time
from types import TracebackType
from typing import Any, Self

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from rapa_dist.config import TrainConfig
from rapa_dist.console import counted, stderr
from rapa_dist.coordinator.checkpoint import Progress as RunProgress
from rapa_dist.coordinator.own_tiles import OwnTiles
from rapa_dist.coordinator.telemetry import RayMetrics
from rapa_dist.coordinator.tiles_table import tiles_table
from rapa_dist.data import DataSet
from rapa_dist.inspection import RunStats
from rapa_dist.layout import machine_of
from rapa_dist.native import native

_REFRESH_S = 0.25
_TABLE_S = 1.0
_METRICS_S = 5.0


class RunDisplay:
    """Shows a training run on stderr, and its tiles to Ray's metrics.

    Costs a clock reading per step, and a redraw four times a second; with the table of the tiles, once a second;
    with metrics, a look at the tiles every five seconds.
    """

    def __init__(
        self,
        config: TrainConfig,
        tiles: OwnTiles,
        *,
        live: bool = False,
        metrics: RayMetrics | None = None,
    ) -> None:
        """Show nothing yet.

        Args:
            config: what is trained.
            tiles: its tiles.
            live: whether to show the table of the tiles, too; needs a terminal.
            metrics: where to keep the tiles' numbers.
        """
        self._config = config
        self._last_draw = self._last_step = 0.0
        self._step_s = 0.0
        self._tiles, self._metrics = tiles, metrics
        self._last_table = self._last_metrics = 0.0
        self._refresh_s = _TABLE_S if live else _REFRESH_S
        self._table: RenderableType = ""
        self._progress: Progress | None = None
        self._live: Live | None = None
        if live and not stderr.is_terminal:
            stderr.print("warning: --live needs a terminal on stderr; a line per epoch is printed instead.")
        if stderr.is_terminal:
            self._progress = Progress(
                TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]} {task.fields[doing]}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                auto_refresh=False,
            )
            self._task = self._progress.add_task("", epoch=1, epochs=config.epochs, doing="train", figures="", left="")
            self._with_table = live
            self._live = Live(
                get_renderable=self._draw,
                console=stderr,
                transient=True,
                auto_refresh=False,  # no second thread next to the training loop
            )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def trained(self, progress: RunProgress, steps_per_epoch: int, loss: float) -> None:
        """Show how training goes."""
        now = time.perf_counter()
        step_s = now - self._last_step
        if progress.step_in_epoch > 1 and self._last_step:
            self._step_s = step_s if not self._step_s else 0.95 * self._step_s + 0.05 * step_s
        self._last_step = now
        self._look(now)
        if self._live is None or self._progress is None or now - self._last_draw < self._refresh_s or not self._step_s:
            return
        self._last_draw = now
        to_do = self._config.epochs * steps_per_epoch - progress.step
        self._progress.update(
            self._task,
            completed=progress.step_in_epoch,
            total=steps_per_epoch,
            epoch=progress.epoch + 1,
            doing="train",
            figures=f"loss {progress.loss_sum / progress.seen:.3f}  "
            f"train error {100 * progress.wrong / progress.seen:.1f} %  "
            f"{self._config.batch_size / self._step_s:,.0f} images/s",
            left=f"{_duration(to_do * self._step_s)} left",
        )
        self._live.refresh()

    def tested(self, done: int, total: int) -> None:
        """Show how a test goes."""
        now = time.perf_counter()
        self._last_step = 0.0
        self._look(now)
        if self._live is not None and self._progress is not None and now - self._last_draw >= self._refresh_s:
            self._last_draw = now
            self._progress.update(self._task, completed=done, total=total, doing="test", left="")
            self._live.refresh()

    def last_look(self) -> RunStats:
        """Return what the tiles have done, and bring the metrics up to it."""
        stats = self._tiles.read()
        if self._metrics is not None:
            self._metrics.record(stats)
        return stats

    def _look(self, now: float) -> None:
        """Look at the tiles, if it is time to: for the table, for the metrics."""
        for_table = self._live is not None and self._with_table and now - self._last_table >= _TABLE_S
        if not for_table and (self._metrics is None or now - self._last_metrics < _METRICS_S):
            return
        stats = self._tiles.read()
        if for_table:
            self._last_table = now
            self._table = tiles_table(stats, width=stderr.width, height=stderr.height - 1)  # below it: the progress
        if self._metrics is not None and now - self._last_metrics >= _METRICS_S:
            self._last_metrics = now
            self._metrics.record(stats)

    def _draw(self) -> RenderableType:
        assert self._progress is not None
        return Group(self._table, self._progress) if self._table else self._progress

    def finished_epoch(self, metrics: dict[str, Any]) -> None:
        """Print one line about an epoch; it stays."""
        wall = metrics["wall"]
        speed = f"{wall['step_ms']:.2f} ms/step" if wall["step_ms"] else ""
        stderr.print(
            f"epoch {metrics['epoch']:>3}/{self._config.epochs}  λ {metrics['learning_rate']:<8.4g} "
            f"loss {metrics['train_loss']:.4f}  train error {metrics['train_error_percent']:6.2f} %  "
            f"test error {metrics['test_error_percent']:6.2f} %  {speed}  {wall['train_s']:.1f} s  "
            f"(device time {metrics['device_time_s']:.3g} s)",
            markup=False,
        )


def introduction(config: TrainConfig, data: DataSet, fabric: str) -> str:
    """Return what is about to be trained, on what, and on which fabric, in two lines."""
    machine = machine_of(config)
    products = "" if fabric == "batched" else f", products {native()}"
    physics = "" if config.physics is None else f", physics {config.physics.name}"
    return (
        f"{data.name}: {len(data.train.labels):,} training and {len(data.test.labels):,} test images in "
        f"{len(data.classes)} classes\n"
        f"{len(machine.tiles)} tiles ({','.join(map(str, config.tiles))}, scheme {config.scheme}, "
        f"fabric {fabric}{products}{physics}), {machine.n_weights:,} weights on them; λ = {config.lr:g}, "
        f"× {config.lr_decay:g} every {counted(config.lr_decay_every, 'epoch')}"
    )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
