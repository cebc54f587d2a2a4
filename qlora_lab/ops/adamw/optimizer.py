"""AdamW (Loshchilov & Hutter 2019) as a torch optimizer, with float or 8-bit states (`reference` has the arithmetic).

The optimizer takes its kernels from outside (`AdamwKernels`), so it runs the same with native ones.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from qlora_lab.errors import ConfigError, RunFolderError, ShapeError
from qlora_lab.ops.adamw import reference
from qlora_lab.ops.adamw.reference import EXP_AVG_SQ_ZERO, EXP_AVG_ZERO, AdamwStep, AdamwTensor
from qlora_lab.ops.blockwise.checks import check_block_size, dtype_name

PARAMETER_DTYPES = (torch.float32, torch.bfloat16)
SMALLEST_8BIT_NUMEL = 4096  # smaller tensors keep float states, as in bitsandbytes: they save nothing


class AdamwKernels(Protocol):
    """An implementation of the two passes over all tensors."""

    def gradient_norm(self, gradients: Sequence[Tensor], gradient_scale: float) -> tuple[float, int | None]:
        """See `reference.gradient_norm`."""

    def update(self, tensors: Sequence[AdamwTensor], step: AdamwStep) -> None:
        """See `reference.adamw_`."""


class StateMemory(Protocol):
    """Where the states of an optimizer lie."""

    def full(self, shape: torch.Size, value: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a tensor that holds `value` everywhere."""


class ReferenceKernels:
    """The functions of `reference`."""

    def gradient_norm(self, gradients: Sequence[Tensor], gradient_scale: float) -> tuple[float, int | None]:
        return reference.gradient_norm(gradients, gradient_scale)

    def update(self, tensors: Sequence[AdamwTensor], step: AdamwStep) -> None:
        reference.adamw_(tensors, step)


class AdamW(torch.optim.Optimizer):
    """AdamW over float32 or bfloat16 parameters, with states in 32 or 8 bits, all tensors in one call.

    States are float32 (or codes) whatever the parameter is; bfloat16 ones are updated in float32 and rounded once.

    The state of a parameter has torch's names (`step`, `exp_avg`, `exp_avg_sq`), and with 8 bits also
    `exp_avg_absmax` and `exp_avg_sq_absmax`; it comes into being at the first step that has a gradient for it.
    Parameters of fewer than 4,096 elements have float states whatever `bits` says.

    Args:
        params: as in every torch optimizer.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`; groups may have their own.
        bits: of a value in the states, 32 or 8.
        block_size: values that share one absmax: a power of two from 32 to 4096.
        kernels: the implementation; without it the pure-torch reference.
        memory: where the states lie; without it, on the parameters' device as any tensor.

    Raises:
        ConfigError: a value is outside of its range.
        ShapeError: a parameter is neither float32 nor bfloat16, or not contiguous.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        bits: int = 32,
        block_size: int = 256,
        kernels: AdamwKernels | None = None,
        memory: StateMemory | None = None,
    ) -> None:
        if bits not in (32, 8):
            raise ConfigError(f"the states of AdamW have 32 or 8 bits; got {bits}")
        check_block_size("block_size of 8-bit AdamW", block_size)
        self.bits = bits
        self.block_size = block_size
        self._kernels = kernels or ReferenceKernels()
        self._memory = memory
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @property
    def is_native(self) -> bool:
        """Whether something faster than the reference runs."""
        return not isinstance(self._kernels, ReferenceKernels)

    @property
    def is_paged(self) -> bool:
        """Whether the states lie in memory whose pages move."""
        return self._memory is not None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        _check_group(self.param_groups[-1])

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps only the attributes that it knows
        own = {"bits": self.bits, "block_size": self.block_size, "_kernels": self._kernels}
        return {**super().__getstate__(), **own, "_memory": self._memory}

    def gradient_norm(self, gradient_scale: float = 1.0) -> tuple[float, Tensor | None]:
        """Return the norm of all gradients times |gradient_scale|, and the first parameter whose is not finite."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        found = [(parameter, gradient) for parameter in parameters if (gradient := _gradient_of(parameter)) is not None]
        norm, first_not_finite = self._kernels.gradient_norm([gradient for _, gradient in found], gradient_scale)
        return norm, None if first_not_finite is None else found[first_not_finite][0]

    @torch.no_grad()
    def step(  # type: ignore[override]  # torch declares its overloads without the scale
        self, closure: Callable[[], float] | None = None, *, gradient_scale: float = 1.0
    ) -> float | None:
        """Update every parameter that has a gradient; return the closure's loss.

        Args:
            closure: computes the loss and the gradients anew.
            gradient_scale: gradients count as multiplied by this, for instance to clip them; they stay as they are.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for step, tensors in self._updates(gradient_scale).items():
            self._kernels.update(tensors, step)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state, as torch's optimizers do, and check that it is one for these parameters.

        Raises:
            RunFolderError: the states have another size, number of bits or block size.
        """
        # torch would convert codes, and float32 states of bfloat16 parameters, to the parameter's dtype
        states = {
            number: {key: value for key, value in values.items() if key != "step"}
            for number, values in state_dict["state"].items()
        }
        steps = {
            number: {key: value for key, value in values.items() if key == "step"}
            for number, values in state_dict["state"].items()
        }
        super().load_state_dict({**state_dict, "state": steps})
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            if number in states:
                values = {key: value.to(parameter.device) for key, value in states[number].items()}
                self.state[parameter].update(values)
                self._check_state(parameter)

    def _updates(self, gradient_scale: float) -> dict[AdamwStep, list[AdamwTensor]]:
        """Count the step of every parameter with a gradient; return the tensors of each distinct update."""
        updates: dict[AdamwStep, list[AdamwTensor]] = {}
        counts: dict[int, Tensor] = {}  # parameters share the tensors of their counts: adding to each costs 4 us
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            rate, eps, weight_decay = float(group["lr"]), group["eps"], group["weight_decay"]
            lists: dict[int, list[AdamwTensor]] = {}  # by step: a parameter without gradients falls behind
            previous = None
            for parameter in group["params"]:
                if (gradient := _gradient_of(parameter)) is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(self._zero_state(parameter))
                count = state["step"]
                if count is not previous:  # reading each costs 0.2 us
                    previous, number = count, int(count) + 1
                    if number not in counts:
                        counts[number] = torch.tensor(float(number), dtype=torch.float32)
                    new_count, tensors = counts[number], lists.setdefault(number, [])
                state["step"] = new_count
                tensor = AdamwTensor(
                    parameter,
                    gradient,
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    state.get("exp_avg_absmax"),
                    state.get("exp_avg_sq_absmax"),
                    weight_decay,
                )
                tensors.append(tensor)
            for number, tensors in lists.items():
                step = AdamwStep(rate, beta1, beta2, eps, number, gradient_scale, self.block_size)
                updates.setdefault(step, []).extend(tensors)
        return updates

    def _layout(self, parameter: Tensor) -> dict[str, tuple[torch.dtype, torch.Size, int]]:
        """Return the dtype, shape and first value of each state of a parameter, in the order of their creation."""
        shape = parameter.shape
        if self.bits == 32 or parameter.numel() < SMALLEST_8BIT_NUMEL:
            return {"exp_avg": (torch.float32, shape, 0), "exp_avg_sq": (torch.float32, shape, 0)}
        blocks = torch.Size([-(-parameter.numel() // self.block_size)])
        return {
            "exp_avg": (torch.uint8, shape, EXP_AVG_ZERO),
            "exp_avg_sq": (torch.uint8, shape, EXP_AVG_SQ_ZERO),
            "exp_avg_absmax": (torch.float32, blocks, 0),
            "exp_avg_sq_absmax": (torch.float32, blocks, 0),
        }

    def _zero_state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = {"step": torch.tensor(0.0, dtype=torch.float32)}
        for key, (dtype, shape, first_value) in self._layout(parameter).items():
            state[key] = self._full(shape, first_value, dtype, parameter.device)
        return state

    def _full(self, shape: torch.Size, value: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if self._memory is not None:
            return self._memory.full(shape, value, dtype, device)
        return torch.full(shape, value, dtype=dtype, device=device)

    def _check_state(self, parameter: Tensor) -> None:
        """Refuse a loaded state that the kernels would read wrongly."""
        state = self.state[parameter]
        expected = {key: (dtype, shape) for key, (dtype, shape, _) in self._layout(parameter).items()}
        given = {key: (value.dtype, value.shape) for key, value in state.items() if key != "step"}
        if "step" not in state or given != expected:
            raise RunFolderError(
                f"the optimizer state of a parameter of {tuple(parameter.shape)} is {_words(given)}; expected "
                f"{_words(expected)}: was it saved with other bits or another block size (here {self.bits} bits, "
                f"blocks of {self.block_size})?"
            )
        for key, (dtype, shape) in expected.items():
            state[key] = state[key].contiguous()
            if self._memory is not None:
                state[key] = self._full(shape, 0, dtype, parameter.device).copy_(state[key])


def _check_group(group: dict[str, Any]) -> None:
    for parameter in group["params"]:
        if parameter.dtype not in PARAMETER_DTYPES or not parameter.is_contiguous():
            kind = "contiguous" if parameter.is_contiguous() else "not contiguous"
            raise ShapeError(
                "AdamW updates contiguous float32 or bfloat16 parameters; "
                f"got {tuple(parameter.shape)} {parameter.dtype}, {kind}"
            )
    if group["eps"] <= 0 or group["weight_decay"] < 0 or group["lr"] < 0:
        raise ConfigError(
            "AdamW needs lr and weight_decay of at least 0 and eps above 0; "
            f"got {group['lr']}, {group['weight_decay']} and {group['eps']}"
        )
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ConfigError(f"the betas of AdamW lie from 0 to below 1; got {group['betas']}")


def _words(states: dict[str, tuple[torch.dtype, torch.Size]]) -> str:
    words = (f"{key} {dtype_name(dtype)} {tuple(shape)}" for key, (dtype, shape) in states.items())
    return ", ".join(words) or "nothing"


def _gradient_of(parameter: Tensor) -> Tensor | None:
    """Return the gradient as kernels read it: in the parameter's dtype (torch allows another), without gaps."""
    gradient = parameter.grad
    if gradient is None or (gradient.dtype is parameter.dtype and gradient.is_contiguous()):
        return gradient  # asking costs a fifth of `to` and `contiguous`, which return it too
    return gradient.to(parameter.dtype).contiguous()
