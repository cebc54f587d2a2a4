"""AdamW (Loshchilov & Hutter 2019) with float or 8-bit states: the optimizer, and its arithmetic in pure torch.

The functions here are the arithmetic that native kernels reproduce bit for bit, and the fallback. An optimizer takes
its kernels from outside (`AdamwKernels`), so it runs the same with either.

8-bit states (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization") are cut into blocks; a block keeps
its largest magnitude (absmax), and each value the rank of the nearest level of the dynamic map, signed for exp_avg
and unsigned for exp_avg_sq.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.optimizer import ParamsT

from qlora_lab.errors import ConfigError, RunFolderError, ShapeError
from qlora_lab.ops.blockwise.checks import check_block_size, dtype_name
from qlora_lab.ops.blockwise.reference import SMALLEST_ABSMAX, to_blocks
from qlora_lab.ops.blockwise.tables import midpoints
from qlora_lab.ops.formats import dynamic_map_levels

SMALLEST_8BIT_NUMEL = 4096  # smaller tensors keep float states, as in bitsandbytes: they save nothing
EXP_AVG_ZERO, EXP_AVG_SQ_ZERO = 127, 0  # the codes of zero
CHUNK = 2**17  # elements updated at once: whole blocks, and temporaries that stay in cache
PIECE, LANES = 4096, 16  # squares are summed by piece of a tensor, in lanes side by side
PIECES_AT_ONCE = 1024


class AdamwTensor(NamedTuple):
    """A parameter, its gradient and its states, all float32, contiguous and of `numel` elements.

    With 8-bit states `exp_avg` and `exp_avg_sq` are uint8 codes and have an absmax for each block of elements.
    """

    parameter: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    exp_avg_absmax: Tensor | None
    exp_avg_sq_absmax: Tensor | None
    weight_decay: float


@dataclass(frozen=True)
class AdamwStep:
    """What the tensors of one update share; `step` counts from 1, and gradients are multiplied by the scale first."""

    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    step: int
    gradient_scale: float = 1.0
    block_size: int = 256


class AdamwKernels(Protocol):
    """An implementation of the two passes over all tensors."""

    def gradient_norm(self, gradients: Sequence[Tensor], gradient_scale: float) -> tuple[float, int | None]:
        """See `gradient_norm`."""

    def update(self, tensors: Sequence[AdamwTensor], step: AdamwStep) -> None:
        """See `adamw_`."""


class StateMemory(Protocol):
    """Where the states of an optimizer lie."""

    def full(self, shape: torch.Size, value: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a tensor that holds `value` everywhere."""


class ReferenceKernels:
    """The functions of this file."""

    def gradient_norm(self, gradients: Sequence[Tensor], gradient_scale: float) -> tuple[float, int | None]:
        return gradient_norm(gradients, gradient_scale)

    def update(self, tensors: Sequence[AdamwTensor], step: AdamwStep) -> None:
        adamw_(tensors, step)


def gradient_norm(gradients: Sequence[Tensor], gradient_scale: float = 1.0) -> tuple[float, int | None]:
    """Return the norm of all gradients together, and the index of the first that is not finite.

    Squares are added in float64 and in one order, so the norm does not depend on threads or devices.

    Args:
        gradients: float32 tensors of any shape.
        gradient_scale: the norm is multiplied by its magnitude.

    Returns:
        The norm, not finite if a gradient is not; and the index of the first gradient with a NaN or an infinity, or
        None.
    """
    total, first_not_finite = 0.0, None
    for index, square in _squares_of_pieces(gradients):
        total += square
        if first_not_finite is None and not math.isfinite(square):
            first_not_finite = index
    return abs(gradient_scale) * math.sqrt(total), first_not_finite


def adamw_(tensors: Sequence[AdamwTensor], step: AdamwStep) -> None:
    """Update parameters and states in place, as `torch.optim.AdamW` does it.

    A block of an 8-bit state that holds a value that is not finite decodes to NaN from then on.
    """
    correction1 = 1.0 - step.beta1**step.step
    correction2 = 1.0 - step.beta2**step.step
    for tensor in tensors:
        if tensor.parameter.numel() == 0:
            continue
        # the C interface takes the weight decay as a float32
        weight_decay = torch.tensor(tensor.weight_decay, dtype=torch.float32).item()
        factors = _Factors(
            gradient_scale=step.gradient_scale,
            decay=1.0 - step.learning_rate * weight_decay,
            beta1=step.beta1,
            beta2=step.beta2,
            step_size=step.learning_rate / correction1,
            inverse_root=1.0 / math.sqrt(correction2),
            eps=step.eps,
        )
        if tensor.exp_avg_absmax is None or tensor.exp_avg_sq_absmax is None:
            _update_float(tensor, factors)
        else:
            _update_blockwise(tensor, tensor.exp_avg_absmax, tensor.exp_avg_sq_absmax, factors, step.block_size)


class AdamW(torch.optim.Optimizer):
    """AdamW over float32 parameters, with states in 32 or 8 bits, all tensors in one call.

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
        ShapeError: a parameter is not float32 or not contiguous.
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
        parameters = [parameter for parameter in parameters if parameter.grad is not None]
        norm, first_not_finite = self._kernels.gradient_norm(
            [parameter.grad.contiguous() for parameter in parameters], gradient_scale
        )
        return norm, None if first_not_finite is None else parameters[first_not_finite]

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
        # torch would convert the codes to float32
        codes = {
            number: {key: value for key, value in values.items() if _is_codes(value)}
            for number, values in state_dict["state"].items()
        }
        rest = {
            number: {key: value for key, value in values.items() if not _is_codes(value)}
            for number, values in state_dict["state"].items()
        }
        super().load_state_dict({**state_dict, "state": rest})
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            if number in codes:
                values = {key: value.to(parameter.device) for key, value in codes[number].items()}
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
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(self._zero_state(parameter))
                number = int(state["step"]) + 1
                if number not in counts:
                    counts[number] = torch.tensor(float(number), dtype=torch.float32)
                state["step"] = counts[number]
                tensor = AdamwTensor(
                    parameter,
                    gradient.contiguous(),
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    state.get("exp_avg_absmax"),
                    state.get("exp_avg_sq_absmax"),
                    weight_decay,
                )
                lists.setdefault(number, []).append(tensor)
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


class _Factors(NamedTuple):
    """What one update multiplies with; torch rounds each to float32 where it meets a tensor."""

    gradient_scale: float
    decay: float
    beta1: float
    beta2: float
    step_size: float
    inverse_root: float
    eps: float


def _update_values(parameter: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, factors: _Factors) -> None:
    """Update flat float32 values in place. Every product and sum is an operation of its own, rounded as it stands."""
    gradient = gradient * factors.gradient_scale
    exp_avg.mul_(factors.beta1).add_(gradient * (1.0 - factors.beta1))
    exp_avg_sq.mul_(factors.beta2).add_(gradient * (1.0 - factors.beta2) * gradient)
    root = exp_avg_sq.double().sqrt_().float()  # correctly rounded; torch's float32 root may be the neighbour
    denominator = root.mul_(factors.inverse_root).add_(factors.eps)
    parameter.mul_(factors.decay).sub_((exp_avg * factors.step_size).div_(denominator))


def _update_float(tensor: AdamwTensor, factors: _Factors) -> None:
    flat = [t.view(-1) for t in (tensor.parameter, tensor.gradient, tensor.exp_avg, tensor.exp_avg_sq)]
    for parameter, gradient, exp_avg, exp_avg_sq in zip(*(torch.split(t, CHUNK) for t in flat), strict=True):
        _update_values(parameter, gradient, exp_avg, exp_avg_sq, factors)


def _update_blockwise(
    tensor: AdamwTensor, exp_avg_absmax: Tensor, exp_avg_sq_absmax: Tensor, factors: _Factors, block_size: int
) -> None:
    elements = [t.view(-1) for t in (tensor.parameter, tensor.gradient, tensor.exp_avg, tensor.exp_avg_sq)]
    chunks = [torch.split(t, CHUNK) for t in elements]
    chunks += [torch.split(t, CHUNK // block_size) for t in (exp_avg_absmax, exp_avg_sq_absmax)]
    for parameter, gradient, codes, square_codes, absmax, square_absmax in zip(*chunks, strict=True):
        exp_avg = _decode(codes, absmax, block_size, signed=True)
        exp_avg_sq = _decode(square_codes, square_absmax, block_size, signed=False)
        _update_values(parameter, gradient, exp_avg, exp_avg_sq, factors)
        _encode(exp_avg, codes, absmax, block_size, signed=True)
        _encode(exp_avg_sq, square_codes, square_absmax, block_size, signed=False)


@cache
def _levels(signed: bool, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # levels first needed under inference_mode must serve training too
        return torch.tensor(dynamic_map_levels(signed=signed), dtype=torch.float32, device=device)


def _decode(codes: Tensor, absmax: Tensor, block_size: int, *, signed: bool) -> Tensor:
    """Return the values of flat codes."""
    values = torch.index_select(_levels(signed, codes.device), 0, codes.int())
    return (to_blocks(values, block_size) * absmax[:, None]).view(-1)[: codes.numel()]


def _encode(values: Tensor, codes: Tensor, absmax: Tensor, block_size: int, *, signed: bool) -> None:
    """Write the codes and absmax of flat values."""
    blocks = to_blocks(values, block_size)
    absmax.copy_(blocks.abs().amax(dim=1))
    scaled = blocks * (1.0 / absmax.clamp(min=SMALLEST_ABSMAX))[:, None]
    ranks = torch.bucketize(scaled, midpoints(_levels(signed, codes.device)), out_int32=True)
    ranks[~absmax.isfinite()] = EXP_AVG_ZERO if signed else EXP_AVG_SQ_ZERO
    codes.copy_(ranks.view(-1)[: codes.numel()])


def _squares_of_pieces(gradients: Sequence[Tensor]) -> Iterator[tuple[int, float]]:
    """Yield the index of the gradient and the sum of squares for each piece, in order."""
    for pieces in _batches(gradients):
        rows = torch.stack([piece for _, piece in pieces]).double().view(len(pieces), PIECE // LANES, LANES)
        lanes = torch.zeros(len(pieces), LANES, dtype=torch.float64, device=rows.device)
        for row in rows.square_().unbind(dim=1):
            lanes += row
        while lanes.shape[1] > 1:
            half = lanes.shape[1] // 2
            lanes = lanes[:, :half] + lanes[:, half:]
        yield from zip([index for index, _ in pieces], lanes[:, 0].tolist(), strict=True)


def _batches(gradients: Sequence[Tensor]) -> Iterator[list[tuple[int, Tensor]]]:
    """Yield lists of (index of the gradient, (PIECE,) elements of it), the last piece of each filled up with zeros."""
    pieces: list[tuple[int, Tensor]] = []
    for index, gradient in enumerate(gradients):
        for piece in torch.split(gradient.detach().reshape(-1), PIECE):
            missing = PIECE - piece.numel()
            pieces.append((index, F.pad(piece, (0, missing)) if missing else piece))
            if len(pieces) == PIECES_AT_ONCE:
                yield pieces
                pieces = []
    if pieces:
        yield pieces


def _check_group(group: dict[str, Any]) -> None:
    for parameter in group["params"]:
        if parameter.dtype != torch.float32 or not parameter.is_contiguous():
            kind = "contiguous" if parameter.is_contiguous() else "not contiguous"
            raise ShapeError(
                f"AdamW updates contiguous float32 parameters; got {tuple(parameter.shape)} {parameter.dtype}, {kind}"
            )
    if group["eps"] <= 0 or group["weight_decay"] < 0 or group["lr"] < 0:
        raise ConfigError(
            "AdamW needs lr and weight_decay of at least 0 and eps above 0; "
            f"got {group['lr']}, {group['weight_decay']} and {group['eps']}"
        )
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ConfigError(f"the betas of AdamW lie from 0 to below 1; got {group['betas']}")


def _is_codes(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.uint8


def _words(states: dict[str, tuple[torch.dtype, torch.Size]]) -> str:
    words = (f"{key} {dtype_name(dtype)} {tuple(shape)}" for key, (dtype, shape) in states.items())
    return ", ".join(words) or "nothing"
