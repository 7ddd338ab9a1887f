"""A tile that is not ideal: the cycles of `AnalogTile`, in the same order, with converters, noise and devices."""

from typing import TYPE_CHECKING

import numpy as np

from rapa_dist.cells import Cells, Word
from rapa_dist.physics.devices import Devices, draw_devices
from rapa_dist.physics.draws import Draws, Floats, Kind, key_of
from rapa_dist.physics.periphery import Product
from rapa_dist.physics.pulses import Sent, update_rows
from rapa_dist.tile import AnalogTile, Matrix, Update

if TYPE_CHECKING:
    from rapa_dist.physics.parameters import Physics


class PhysicalTile(AnalogTile):
    """One kernel matrix K (k + 1, c_out) on an array that is not ideal.

    All that it draws is a function of its key and of what it draws it for; so a cycle that is repeated, in this process
    or in another one, has the same bits. Its devices are drawn anew by every process. What is stored in devices, where
    that is not what is seen of them, lies in the cells where an ideal tile has room for a gradient.
    """

    __slots__ = ("_cycle", "_draws", "_has_bias", "_products", "devices", "physics")

    def __init__(
        self, cells: Cells, physics: "Physics", *, seed: int, place: tuple[int, int], bias: bool = True
    ) -> None:
        """Work on a kernel matrix.

        Args:
            cells: what keeps it.
            physics: what its array is like.
            seed: the run's.
            place: index of the tile array, and of the tile in it.
            bias: whether the last row of the matrix is the bias.
        """
        super().__init__(cells, bias=bias)
        self.physics, self._has_bias, self._cycle = physics, bias, 0
        self._draws = Draws(key_of(seed, *place))
        self._products = (
            Product(physics.forward, self._draws),
            Product(physics.backward, self._draws, backward=True),
        )
        self.devices: Devices | None = None
        if physics.device is not None:
            self.devices = draw_devices(physics.device, cells.kernel_shape, self._draws, bias=bias)

    def program(self, kernel: Matrix, step: int) -> None:
        """Write a kernel (k + 1, c_out), as after `step` steps, into the cells: within the devices' bounds."""
        cells, devices = self.cells, self.devices
        if devices is None:
            cells.program(kernel, step)
            return
        clipped = devices.clip(kernel)
        cells.program(clipped, step)
        if devices.write_noise > 0:
            self._stored(0)[:] = clipped
            cells.kernel[:] = self._seen(clipped, step)

    def restore(self, kernel: Matrix, stored: Matrix) -> None:
        """Put what was stored back, (k + 1, c_out), with what was seen of it."""
        active = self.cells.words[Word.COMMIT] & 3
        self._stored(active)[:] = stored
        self.cells.kernels[active][:] = kernel

    @property
    def stored(self) -> Matrix | None:
        """What is stored in the devices, (k + 1, c_out): a view; None where it is what is seen, the kernel."""
        if self.devices is None or self.devices.write_noise == 0:
            return None
        return self._stored(self.cells.words[Word.COMMIT] & 3)

    def forward(self, patches: Matrix, outputs: Matrix, draw: int = 0) -> None:
        """Compute M = I K + bias on the array; `draw`: 64-bit number of the passage, which its noise is drawn for."""
        self._cycle = draw
        super().forward(patches, outputs, draw)

    def backward(
        self,
        patches: Matrix,
        errors: Matrix,
        *,
        cycle: int,
        update: Update | None,
        input_error: bool,
        commit: bool = True,
        draw: int = 0,
    ) -> None:
        """Compute dI = D Kᵀ, and update K by pulses where it has devices; as `AnalogTile.backward`."""
        self._cycle = draw
        super().backward(patches, errors, cycle=cycle, update=update, input_error=input_error, commit=commit, draw=draw)

    def _multiply(self, active: int, patches: Matrix, outputs: Matrix) -> None:
        self.cells.words[Word.REPEATED] += self._product(active, patches, outputs, backward=False)

    def _multiply_back(self, active: int, errors: Matrix, input_errors: Matrix) -> None:
        self._product(active, errors, input_errors, backward=True)

    def _ends_batches(self) -> bool:
        devices = self.devices
        return devices is not None and (devices.decay is not None or devices.diffusion is not None)

    def _add_update(
        self, buffers: tuple[int, int], patches: Matrix, errors: Matrix, update: Update, *, first: bool, commit: bool
    ) -> None:
        devices = self.devices
        if devices is None:
            super()._add_update(buffers, patches, errors, update, first=first, commit=commit)
            return
        source, target = buffers
        seen, stored = self.cells.kernels[target], self.cells.kernels[target]
        seen[:] = self.cells.kernels[source]
        if devices.write_noise > 0:
            stored = self._stored(target)
            stored[:] = self._stored(source)
        sent = self._pulse((stored, seen), (patches, errors), update.learning_rate)
        words = self.cells.words
        words[Word.TRAINS] += sent.trains
        words[Word.SLOTS] += sent.slots
        words[Word.PULSES_SENT] += sent.pulses
        if commit and self._ends_batches():
            step = words[Word.STEP]
            stored[:] = devices.end_batch(stored, self._draws, step)
            if devices.write_noise > 0:
                seen[:] = self._seen(stored, step + 1)

    def _seen(self, stored: Matrix, step: int) -> Matrix:
        """Return what is seen of weights that have all been written anew."""
        assert self.devices is not None
        noise = self._draws.normal(Kind.WRITE_NOISE, step, np.arange(len(stored)), stored.shape[1])
        found: Matrix = stored + self.devices.write_noise * noise
        return found

    def _stored(self, buffer: int) -> Matrix:
        found: Matrix = self.cells.buffers[buffer, 1].reshape(self.cells.kernel_shape)
        return found

    # what `NativePhysicalTile` does in C

    def _product(self, active: int, vectors: Matrix, results: Matrix, *, backward: bool) -> int:
        """Multiply with the kernel of a buffer; returns how many passes bound management has repeated."""
        if backward:
            found, repeated = self._products[1].multiply(vectors, self._transposed[active], self._cycle)
        else:
            inputs = self._with_ones(vectors)
            found, repeated = self._products[0].multiply(inputs, self.cells.kernels[active], self._cycle)
        results[:] = found
        return repeated

    def _pulse(self, weights: tuple[Floats, Floats], rows: tuple[Matrix, Matrix], rate: float) -> Sent:
        """Update weights, what is stored and what is seen, by patches and errors."""
        assert self.devices is not None
        patches, errors = rows
        return update_rows(
            self.physics.update,
            self.devices,
            weights,
            (self._with_ones(patches), errors),
            rate,
            self._draws,
            self._cycle,
        )

    def _with_ones(self, patches: Matrix) -> Matrix:
        if not self._has_bias:
            return patches
        return np.concatenate((patches, np.ones((len(patches), 1), np.float32)), axis=1)
