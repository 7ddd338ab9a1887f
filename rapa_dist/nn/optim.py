"""Stochastic gradient descent for models on tiles: tiles update themselves, digital parameters are updated here."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from rapa_dist.errors import UsageError
from rapa_dist.nn.layers import TiledLayer
from rapa_dist.nn.session import Session

_DIGITAL = "digital"


class RapaSGD(torch.optim.Optimizer):
    """Plain SGD, K ← (1 − λ · weight decay) K − λ ∇, with a parameter group for every tiled layer.

    λ and decay go out to the tiles with the errors of `backward()`, so they count as they are then. `step()` puts the
    kernels that the tiles have prepared in force, and takes the step of the digital parameters by the same rule.
    Gradients accumulate over several `backward()`; `torch.optim.lr_scheduler` changes λ as it does everywhere.

    Example:
        >>> import torch, rapa_dist as rapa
        >>> model = torch.nn.Sequential(rapa.RapaConv2d(1, 2, 3, tiles=2), torch.nn.Flatten(), torch.nn.Linear(72, 2))
        >>> optimizer = rapa.RapaSGD(model, lr=0.1, lr_of={"0": 0.01})
        >>> schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        >>> model(torch.ones(3, 1, 8, 8)).sum().backward()
        >>> optimizer.step()
        >>> schedule.step()
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.005, 0.05]
    """

    def __init__(
        self, model: nn.Module, lr: float, weight_decay: float = 0.0, *, lr_of: Mapping[str, float] | None = None
    ) -> None:
        """Update all parameters of a model.

        Args:
            model: with layers on tiles.
            lr: λ.
            weight_decay: relative decay of all weights per step and unit of λ.
            lr_of: by name of a tiled layer a λ of its own.

        Raises:
            UsageError: λ is not above 0, decay not in [0, 1 / λ), or there is no such layer.
        """
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, TiledLayer)}
        lr_of = dict(lr_of or {})
        if unknown := lr_of.keys() - layers.keys():
            raise UsageError(
                f"lr_of names {', '.join(sorted(unknown))}, but the layers on tiles are {', '.join(layers) or 'none'}."
            )
        for rate in (lr, *lr_of.values()):
            if not 0 < rate < float("inf"):
                raise UsageError(f"lr needs a number above 0, like 0.05; it is {rate}.")
            if not 0 <= weight_decay * rate < 1:
                raise UsageError(
                    f"weight_decay needs a number from 0 to below 1 / lr, like 0.0001; it is {weight_decay}."
                )
        of_tiles = {id(layer.kernels) for layer in layers.values()}
        digital = [parameter for parameter in model.parameters() if id(parameter) not in of_tiles]
        groups: list[dict[str, Any]] = [
            {"params": [layer.kernels], "lr": lr_of.get(name, lr), "ratio": lr_of.get(name, lr) / lr, "name": name}
            for name, layer in layers.items()
        ]
        if digital:
            groups.append({"params": digital, "ratio": 1.0, "name": _DIGITAL})
        self._layers = layers
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        self._hand_out_rates()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take further parameters, as `torch.optim.Optimizer` does."""
        # what is around PyTorch's own method imports its compiler, which takes a second and is of no use here
        inspect.unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)

    def _hand_out_rates(self) -> None:
        for group in self.param_groups:
            if group["name"] in self._layers:
                self._layers[group["name"]].rates = group

    @property
    def _sessions(self) -> list[Session]:
        return list({id(layer.session): layer.session for layer in self._layers.values()}.values())

    def set_rate(self, lr: float) -> None:
        """Set λ; layers with a λ of their own keep their ratio to it."""
        for group in self.param_groups:
            group["lr"] = lr * group["ratio"]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Put the tiles' updates in force, and update the digital parameters.

        Raises:
            UsageError: there was no backward() before it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.take_step()
        return loss

    @torch.no_grad()
    def take_step(self) -> None:
        """Do what `step` does, without what PyTorch puts around that: hooks and an entry for its profiler.

        Raises:
            UsageError: there was no backward() before it.
        """
        sessions = self._sessions
        with_gradient = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not with_gradient and not any(session.learnt for session in sessions):
            raise UsageError("step() found nothing to do: call backward() on the loss first.")
        for group, parameter in with_gradient:
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(parameter.grad, alpha=group["lr"])
            parameter.grad = None
        for session in sessions:
            session.put_in_force()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients of digital parameters, and updates that tiles have prepared."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if set_to_none or parameter.grad is None:
                    parameter.grad = None
                else:
                    parameter.grad.detach_().zero_()
        for session in self._sessions:
            if session.learnt:
                session.drop()

    def state_dict(self) -> dict[str, Any]:
        """Return λ and decay of every group, and the number of steps taken: what assignments are drawn for.

        With the model's own state dict it is all that a training goes on from, bit by bit.
        """
        found: dict[str, Any] = super().state_dict()
        return found | {"step": max((session.step for session in self._sessions), default=0)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another optimizer of the same model was.

        Raises:
            UsageError: it was of another model; the difference is shown.
        """
        theirs, ours = (
            {group["name"]: len(group["params"]) for group in groups} for groups in _groups(state_dict, self)
        )
        if theirs != ours:
            raise UsageError(
                "The state dict is of an optimizer of another model: it has "
                f"{_counted(theirs)}; this one has {_counted(ours)}. Build the model and convert it as before."
            )
        super().load_state_dict(state_dict)
        self._hand_out_rates()
        for session in self._sessions:
            session.step = state_dict["step"]
        for layer in self._layers.values():
            layer.pull()
            layer.push()  # tiles count steps, too


def _groups(state_dict: Mapping[str, Any], optimizer: RapaSGD) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    theirs = state_dict.get("param_groups", ())
    if "step" not in state_dict or not all("name" in group for group in theirs):
        raise UsageError("load_state_dict() takes what the state_dict() of a RapaSGD returned; this is something else.")
    return list(theirs), optimizer.param_groups


def _counted(groups: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count} parameter{'s' if count != 1 else ''})" for name, count in groups.items())
