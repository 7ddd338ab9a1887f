"""Putting the layers of any model on tiles, and making an ordinary PyTorch model of them again."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rapa_dist.balance import in_proportion
from rapa_dist.errors import UsageError
from rapa_dist.geometry import Geometry
from rapa_dist.nn.layers import RapaConv2d, RapaLinear, TiledLayer
from rapa_dist.nn.record import Images, meetings
from rapa_dist.schemes import SQUARE_SCHEMES, check_tiles

Where = Callable[[str, nn.Module], bool]
"""(name, module) → whether the module goes on tiles."""
INITS = ("weights", "xavier")
"""What is programmed into the tiles: the model's own weights, or independent draws for every tile (the paper)."""
METHODS = ("norm",)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertedLayer:
    """What became of one layer."""

    name: str
    """Its name in the model."""
    kernel_matrix: tuple[int, int] | None
    """(k + 1, c_out), without the bias row where there is none; None for a layer that was left digital."""
    patches: int | None
    """n_p per image; None where no images were given."""
    tiles: int
    """n_t; 0 for a layer that was left digital."""
    why_digital: str
    """Why it was left digital; empty for a layer on tiles."""

    @property
    def rows_per_tile(self) -> float | None:
        """Rows of a tile per image, in the mean."""
        return self.patches / self.tiles if self.patches and self.tiles else None


@dataclass(frozen=True, slots=True)
class Conversion:
    """What `convert` did; prints as a table."""

    layers: tuple[ConvertedLayer, ...]

    @property
    def tiles(self) -> tuple[int, ...]:
        """n_t of the layers on tiles, in order."""
        return tuple(layer.tiles for layer in self.layers if layer.tiles)

    def __str__(self) -> str:
        head = ("layer", "kernel matrix", "patches", "tiles", "rows per tile", "left digital")
        rows = [head]
        for layer in self.layers:
            matrix = "×".join(map(str, layer.kernel_matrix)) if layer.kernel_matrix else "–"
            rate = layer.rows_per_tile
            rows.append(
                (
                    layer.name,
                    matrix,
                    "–" if layer.patches is None else f"{layer.patches:,}",
                    str(layer.tiles or "–"),
                    "–" if rate is None else f"{rate:,.1f}",
                    layer.why_digital,
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        align = ("<", ">", ">", ">", ">", "<")
        lines = ("  ".join(f"{cell:{a}{w}}" for cell, a, w in zip(row, align, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)


def convert(
    model: nn.Module,
    tiles: int | Sequence[int] | Mapping[str, int],
    *,
    scheme: str | None = None,
    where: Where | None = None,
    images: Images | None = None,
    init: str = "weights",
) -> Conversion:
    """Put the convolutions of a model on tiles, in place; linear layers, too, where `where` asks for them.

    Args:
        model: any model; its convolutions are replaced by `RapaConv2d`.
        tiles: n_t: a list in the order of the layers, a mapping by module name (layers that it does not name stay
            digital), or one number for the layer with most patches, the others in proportion to theirs (§5).
        scheme: tiling scheme of all layers; by default "random", and "none" for layers with one tile.
        where: (name, module) → whether a convolution or linear layer goes on tiles; by default all convolutions do.
        images: a batch of images as the model takes them, or its shape, (images, channels, h, w); several for a model
            with several inputs. They tell how many patches a layer has; needed where `tiles` is one number.
        init: "weights" programs the model's weights into all tiles alike; "xavier" draws every tile's independently.

    Returns:
        What became of every layer.

    Raises:
        UsageError: no layer can be put on tiles, or not in this way; the model is as it was.

    Example:
        >>> import torch, rapa_dist as rapa
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 5), torch.nn.MaxPool2d(2), torch.nn.Conv2d(8, 8, 3))
        >>> print(rapa.convert(model, tiles=16, images=(10, 3, 32, 32)))
        layer  kernel matrix  patches  tiles  rows per tile  left digital
        0               76×8      784     16           49.0
        2               73×8      144      3           48.0
    """
    if init not in INITS:
        raise UsageError(f"init is one of {', '.join(INITS)}; not “{init}”.")
    found = _candidates(model)
    if already := [name for name, module in found.items() if isinstance(module, TiledLayer)]:
        raise UsageError(f"The model is on tiles already: {', '.join(already)}. Call revert(model) first.")
    chosen, why = _choose(found, where, set(tiles) if isinstance(tiles, Mapping) else None)
    if not chosen:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in why.items())
        raise UsageError(
            "The model has no convolution that can be put on tiles"
            + (f" ({reasons})." if reasons else ". Pass where=… to choose among its linear layers.")
        )
    _check_unshared(model, chosen)
    patches = None if images is None else _patches(model, chosen, images)
    numbers = _numbers(tiles, list(chosen), patches, scheme)
    replacements = {}
    for name, module in chosen.items():
        layer_scheme = (scheme if numbers[name] > 1 else None) if scheme != "none" else scheme
        for plane in (geometry.out for geometry in patches[name]) if patches else (None,):
            check_tiles(
                layer_scheme or ("random" if numbers[name] > 1 else "none"), numbers[name], where=name, plane=plane
            )
        replacements[module] = _tiled(module, numbers[name], layer_scheme, init)
    _replace(model, replacements)
    return Conversion(
        tuple(_described(name, module, replacements, numbers, patches, why) for name, module in found.items())
    )


def _patches(model: nn.Module, chosen: Mapping[str, nn.Module], images: Images) -> dict[str, list[Geometry]]:
    """Return by name of the layer how its patches lie, for each time that an image passes through it."""
    met, _ = meetings(model, {module: name for name, module in chosen.items()}, images)
    return {name: [meeting.geometry for meeting in met[module]] for name, module in chosen.items()}


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    kinds = nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.modules.conv._ConvTransposeNd, TiledLayer
    return {name or "(model)": module for name, module in model.named_modules() if isinstance(module, kinds)}


def _choose(
    found: Mapping[str, nn.Module], where: Where | None, named: set[str] | None
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return the layers that go on tiles, and why the others do not."""
    chosen, why = {}, {}
    if named is not None and (unknown := named - found.keys()):
        raise UsageError(f"tiles names {', '.join(sorted(unknown))}; the model's layers are {', '.join(found)}.")
    for name, module in found.items():
        wanted = (
            where(name, module) if where else isinstance(module, nn.Conv2d) or (named is not None and name in named)
        )
        if name == "(model)":
            reason = "it is the model itself, not a layer in it"
        elif named is not None and name not in named:
            reason = "tiles does not name it"
        elif not wanted:
            reason = "where does not choose it" if where else "only convolutions by default"
        else:
            reason = _unfit(module)
            if reason and named is not None:
                raise UsageError(f"{name} can't be put on tiles: {reason}. Leave it out of tiles.")
        if reason:
            why[name] = reason
        else:
            chosen[name] = module
    return chosen, why


def _unfit(module: nn.Module) -> str:
    """Return why a layer can't be put on tiles; empty where it can."""
    if type(module) not in (nn.Conv2d, nn.Linear):
        return f"{type(module).__name__} is neither Conv2d nor Linear"
    if isinstance(module, nn.Conv2d):
        if module.groups != 1:
            return f"groups = {module.groups}: a tile holds one kernel matrix for all channels"
        if module.padding_mode != "zeros":
            return f"padding_mode = {module.padding_mode}: tiles see zeros beyond the border"
    return ""


def _check_unshared(model: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            other = owners.setdefault(id(parameter), name)
            if other != name and (name in chosen or other in chosen):
                raise UsageError(
                    f"{other} and {name} share one weight, which can't be on two tile arrays. Use one module in both "
                    "places, or give each a weight of its own."
                )


def _numbers(
    tiles: int | Sequence[int] | Mapping[str, int],
    names: Sequence[str],
    patches: Mapping[str, Sequence[Geometry]] | None,
    scheme: str | None,
) -> dict[str, int]:
    """Return n_t by name of the layer."""
    if isinstance(tiles, Mapping):
        return {name: tiles[name] for name in names}
    if isinstance(tiles, int):
        if patches is None:
            raise UsageError(
                "tiles is one number, for the layer with most patches: pass images=(images, channels, h, w), from "
                "which the patches of every layer follow, or a list of numbers."
            )
        counts = [sum(geometry.n_patches for geometry in patches[name]) for name in names]
        return dict(zip(names, in_proportion(counts, tiles, square=scheme in SQUARE_SCHEMES), strict=True))
    numbers = list(tiles)
    if len(numbers) != len(names):
        raise UsageError(
            f"tiles needs one number for each of the {len(names)} layers ({', '.join(names)}); it has {len(numbers)}: "
            f"{', '.join(map(str, numbers))}."
        )
    return dict(zip(names, numbers, strict=True))


def _tiled(module: nn.Module, tiles: int, scheme: str | None, init: str) -> TiledLayer:
    assert isinstance(module, nn.Conv2d | nn.Linear)
    bias = module.bias
    layer: TiledLayer
    if isinstance(module, nn.Conv2d):
        layer = RapaConv2d(
            module.in_channels,
            module.out_channels,
            module.kernel_size,  # type: ignore[arg-type]
            module.stride,  # type: ignore[arg-type]
            module.padding,  # type: ignore[arg-type]
            module.dilation,  # type: ignore[arg-type]
            bias=bias is not None,
            tiles=tiles,
            scheme=scheme,
        )
    else:
        assert isinstance(module, nn.Linear)
        layer = RapaLinear(module.in_features, module.out_features, bias=bias is not None, tiles=tiles, scheme=scheme)
    weight = module.weight
    layer.to(device=weight.device)
    layer.train(module.training)
    layer.kernels.requires_grad_(weight.requires_grad)
    if init == "weights":
        with torch.no_grad():
            layer.kernels[:, : layer.k] = as_matrix(weight)
            if bias is not None:
                layer.kernels[:, layer.k] = bias
    return layer


def as_matrix(weight: Tensor) -> Tensor:
    """Return a weight of `Conv2d` (c_out, c_in, kh, kw) or `Linear` (c_out, c_in) as tiles have it, (k, c_out)."""
    ordered = weight.permute(2, 3, 1, 0) if weight.dim() == 4 else weight.t()
    return ordered.reshape(-1, weight.shape[0])


def _replace(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    for parent in list(model.modules()):
        for name, child in parent._modules.items():  # named_children() would pass over one that has two names
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]


def _described(
    name: str,
    module: nn.Module,
    replacements: Mapping[nn.Module, TiledLayer],
    numbers: Mapping[str, int],
    patches: Mapping[str, Sequence[Geometry]] | None,
    why: Mapping[str, str],
) -> ConvertedLayer:
    layer = replacements.get(module)
    return ConvertedLayer(
        name=name,
        kernel_matrix=None if layer is None else (layer.kernels.shape[1], layer.kernels.shape[2]),
        patches=sum(g.n_patches for g in patches[name]) if layer is not None and patches else None,
        tiles=numbers.get(name, 0),
        why_digital=why.get(name, ""),
    )


def revert(model: nn.Module, by: str = "norm") -> nn.Module:
    """Make an ordinary PyTorch model of one on tiles, in place: one kernel matrix per layer (§4, reduction).

    Args:
        model: with layers on tiles.
        by: "norm": of every output channel the filter with the largest norm among the tiles. With one tile it is that
            tile's, exactly.

    Returns:
        The model.

    Raises:
        UsageError: it has no layer on tiles.

    Example:
        >>> import torch, rapa_dist as rapa
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3))
        >>> summary = rapa.convert(model, tiles=[4])
        >>> rapa.revert(model)
        Sequential(
          (0): Conv2d(1, 2, kernel_size=(3, 3), stride=(1, 1))
        )
    """
    if by not in METHODS:
        raise UsageError(f"by is one of {', '.join(METHODS)}; not “{by}”.")
    layers = [layer for layer in model.modules() if isinstance(layer, TiledLayer)]
    if not layers:
        raise UsageError("The model has no layers on tiles, so there is nothing to revert.")
    _replace(model, {layer: digital(layer, reduced(layer)) for layer in layers})
    return model


def reduced(layer: TiledLayer) -> Tensor:
    """Return (k + 1, c_out): of every output channel filter and bias of the tile whose filter has the largest norm."""
    layer.pull()
    kernels = layer.kernels.detach()
    strongest = kernels[:, : layer.k].norm(dim=1).argmax(dim=0)  # (c_out,)
    return kernels[strongest, :, torch.arange(layer.c_out)].t()


def digital(layer: TiledLayer, matrix: Tensor) -> nn.Module:
    """Return the ordinary layer with one kernel matrix (k + 1, c_out)."""
    made: nn.Module
    if isinstance(layer, RapaConv2d):
        made = nn.utils.skip_init(  # type: ignore[no-untyped-call]
            nn.Conv2d,
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            bias=layer.has_bias,
        )
        weight = matrix[: layer.k].view(*layer.kernel_size, layer.in_channels, layer.c_out).permute(3, 2, 0, 1)
    else:
        made = nn.utils.skip_init(nn.Linear, layer.k, layer.c_out, bias=layer.has_bias)  # type: ignore[no-untyped-call]
        weight = matrix[: layer.k].t()
    with torch.no_grad():
        made.weight.copy_(weight)  # type: ignore[operator]
        if layer.has_bias:
            made.bias.copy_(matrix[layer.k])  # type: ignore[operator]
    return made.train(layer.training)
