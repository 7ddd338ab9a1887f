"""Convolutions and fully connected layers on tiles, as PyTorch modules."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from rapa_dist.errors import UsageError
from rapa_dist.fabric.batched import BatchedFabric
from rapa_dist.geometry import Geometry, Pair
from rapa_dist.machine import Machine, TileArray
from rapa_dist.nn.passing import Call, pass_through
from rapa_dist.nn.session import Session
from rapa_dist.schemes import check_tiles


class TiledLayer(nn.Module):
    """A layer whose kernel matrix is replicated on n_t tiles, K_1 … K_nt, each trained on its own.

    `kernels` (n_t, k + 1, c_out), the bias last, belongs to the layer as long as no fabric is open, and it computes as
    one process. In an open fabric the tiles have them, and `state_dict()` asks the tiles.
    """

    kernels: nn.Parameter
    rates: Mapping[str, Any] | None = None
    """The optimizer's parameter group, with "lr" and "weight_decay"; None: nothing is learnt."""

    def __init__(self, k: int, c_out: int, *, bias: bool, tiles: int, scheme: str | None) -> None:
        super().__init__()
        self.scheme = scheme or ("random" if tiles > 1 else "none")
        check_tiles(self.scheme, tiles, where=f"{type(self).__name__}(tiles={tiles}, scheme={scheme!r})")
        self.n_tiles, self.perforation = (1, tiles) if self.scheme == "perforated" else (tiles, 1)
        self.k, self.c_out, self.has_bias = k, c_out, bias
        self.kernels = nn.Parameter(torch.empty(self.n_tiles, k + bias, c_out))
        self._attached: tuple[Session, TileArray] | None = None
        self._alone: tuple[Session, TileArray] | None = None
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw every tile's kernel independently: uniform in ±√(3 / k), biases 0 (Caffe2's Xavier)."""
        bound = (3 / self.k) ** 0.5
        with torch.no_grad():
            self.kernels[:, : self.k].uniform_(-bound, bound, generator=generator)
            self.kernels[:, self.k :].zero_()

    @property
    def session(self) -> Session:
        """Where the layer's tiles are: in an open fabric, else in the layer itself."""
        return self.home()[0]

    @property
    def array(self) -> TileArray:
        """The layer's tiles, as their fabric counts them."""
        return self.home()[1]

    def home(self) -> tuple[Session, TileArray]:
        """Return both."""
        if self._attached is not None:
            return self._attached
        if self._alone is None:
            array = TileArray(
                index=0,
                name=type(self).__name__,
                k=self.k,
                c_out=self.c_out,
                n_tiles=self.n_tiles,
                bias=self.has_bias,
                scheme=self.scheme,
                perforation=self.perforation,
            )
            self._alone = Session(BatchedFabric(Machine((array,)), [self.kernels]), seed=0), array
        return self._alone

    def _called(self, input: Tensor) -> Call:
        """Return what is to be known of a call with an input."""
        session, array = self.home()
        geometry = geometry_of(self, input, array.name)
        training = self.training and torch.is_grad_enabled()
        return Call(self, session, array, geometry, session.part_for(array.index, input.shape[0], training=training))

    @property
    def attached(self) -> bool:
        """Whether it computes on the tiles of an open fabric."""
        return self._attached is not None

    def attach(self, session: Session, array: TileArray) -> None:
        """Compute on the tiles of a fabric from now on."""
        self._attached, self._alone = (session, array), None

    def detach(self) -> None:
        """Compute alone again, with the kernels that the tiles have now; if they are lost, with those seen last."""
        try:
            self.pull()
        finally:
            self._attached = None

    def pull(self) -> None:
        """Copy the kernels that the tiles have into `kernels`."""
        if self._attached is not None:
            session, array = self._attached
            with torch.no_grad():
                self.kernels.copy_(torch.from_numpy(session.fabric.kernels(array)))

    def push(self) -> None:
        """Program `kernels` into the tiles."""
        if self._attached is not None:
            session, array = self._attached
            session.fabric.write(array, self.kernels.detach().cpu().numpy(), session.step)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.pull()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.push()

    def __getstate__(self) -> dict[str, Any]:
        self.pull()
        return self.__dict__ | {"_attached": None, "_alone": None}  # a copy stays outside


class RapaConv2d(TiledLayer):
    """A convolution on tiles; arguments as of `torch.nn.Conv2d`, and `tiles` and `scheme`.

    Outside of an open fabric it computes by itself, so that shapes can be tried out without any cluster.

    Example:
        >>> import torch, rapa_dist as rapa
        >>> layer = rapa.RapaConv2d(3, 8, (5, 3), stride=2, padding="valid", tiles=4)
        >>> layer.kernels.shape, layer(torch.zeros(2, 3, 32, 48)).shape
        (torch.Size([4, 46, 8]), torch.Size([2, 8, 14, 23]))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: int | Pair | str = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        tiles: int = 1,
        scheme: str | None = None,
    ) -> None:
        kh, kw = kernel = _pair("kernel_size", kernel_size, 1)
        super().__init__(kh * kw * in_channels, out_channels, bias=bias, tiles=tiles, scheme=scheme)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel
        self.stride, self.dilation = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
        self.padding = padding if isinstance(padding, str) else _pair("padding", padding, 0)
        if groups != 1:
            raise UsageError(
                f"RapaConv2d has one kernel matrix for all channels; groups={groups} has several. Leave it digital."
            )
        if padding_mode != "zeros":
            raise UsageError(
                f"RapaConv2d pads with zeros; not by padding_mode={padding_mode!r}. Leave such a layer digital."
            )

    def forward(self, input: Tensor) -> Tensor:
        """Return (images, c_out, h, w) for images (images, c_in, h, w); without the first dimension for one."""
        if input.dim() == 3:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        return pass_through(self._called(input), input)

    def extra_repr(self) -> str:
        """Return what `print` shows."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, tiles={self.n_tiles * self.perforation}, scheme={self.scheme}"
        )


class RapaLinear(TiledLayer):
    """A fully connected layer on tiles; arguments as of `torch.nn.Linear`, and `tiles` and `scheme`.

    Every vector of the input is a patch: for (images, length, features) an image has `length` of them.

    Example:
        >>> import torch, rapa_dist as rapa
        >>> rapa.RapaLinear(6, 2, tiles=3)(torch.zeros(4, 5, 6)).shape
        torch.Size([4, 5, 2])
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, tiles: int = 1, scheme: str | None = None
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, tiles=tiles, scheme=scheme)
        self.in_features, self.out_features = in_features, out_features

    def forward(self, input: Tensor) -> Tensor:
        """Return (…, out_features) for vectors (…, in_features)."""
        if input.dim() == 1:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        call = self._called(input)
        planes = input.reshape(input.shape[0], -1, 1, self.in_features).permute(0, 3, 1, 2)
        return pass_through(call, planes).permute(0, 2, 3, 1).reshape(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Return what `print` shows."""
        return f"{self.in_features}, {self.out_features}, tiles={self.n_tiles * self.perforation}, scheme={self.scheme}"


def geometry_of(layer: nn.Module, input: Tensor, name: str) -> Geometry:
    """Return how the patches of an input of a convolution or linear layer lie, on tiles or not.

    Args:
        layer: `RapaConv2d`, `RapaLinear`, `Conv2d` or `Linear`.
        input: images (…, c_in, h, w), or vectors (images, …, features).
        name: of the layer, for messages.

    Raises:
        UsageError: the layer does not take the input.
    """
    if isinstance(layer, RapaLinear | nn.Linear):
        if input.dim() < 1 or input.shape[-1] != layer.in_features:
            raise UsageError(f"{name} takes vectors (…, {layer.in_features}); it got {tuple(input.shape)}.")
        return Geometry(size=(input.shape[1:-1].numel(), 1))
    assert isinstance(layer, RapaConv2d | nn.Conv2d)
    if input.dim() not in (3, 4) or input.shape[-3] != layer.in_channels:
        raise UsageError(f"{name} takes images (images, {layer.in_channels}, h, w); it got {tuple(input.shape)}.")
    size: Any = input.shape[-2:]
    try:
        return _padded_by(layer.padding, layer.kernel_size, layer.dilation, layer.stride, size)
    except ValueError as error:
        raise UsageError(f"{name}: {error}. Use larger images, or a smaller network.") from None


@lru_cache(maxsize=1024)
def _padded_by(padding: Pair | str, kernel: Pair, dilation: Pair, stride: Pair, size: Pair) -> Geometry:
    h, w = size
    return Geometry.padded_by(padding, kernel=kernel, dilation=dilation, size=(h, w), stride=stride)


def _pair(name: str, value: int | Pair, least: int) -> Pair:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(number, int) and number >= least for number in pair):
        raise UsageError(f"{name} needs one or two numbers of at least {least}; it is {value}.")
    return pair[0], pair[1]
