"""The CUDA AdamW: all tensors of a step in one launch, and one wait for the device in each step, for the norm."""

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from qlora_lab.ops.adamw.reference import AdamwStep, AdamwTensor
from qlora_lab.ops.native.adamw import gradient_words, tensor_words
from qlora_lab.ops.native.cuda_library import CudaLibrary
from qlora_lab.ops.native.cuda_streams import Streams

PIECE = 4096  # QLK_CUDA_PIECE: elements that one block of threads updates


class CudaAdamw:
    """`ops.adamw.optimizer.AdamwKernels` for tensors of one CUDA device."""

    def __init__(self, library: CudaLibrary, streams: Streams) -> None:
        self._library = library
        self._streams = streams

    def gradient_norm(self, gradients: Sequence[Tensor], gradient_scale: float) -> tuple[float, int | None]:
        if not gradients:
            return 0.0, None
        table = _Table(gradient_words(gradients), [gradient.numel() for gradient in gradients], gradients[0].device)
        workspace = torch.empty(table.pieces + 2, dtype=torch.float64, device=gradients[0].device)
        result = workspace[table.pieces :]  # a double and an int64
        with self._streams.queue(workspace.device) as stream:
            self._library.qlk_cuda_gradient_norm(
                *(table.tensors, table.first_piece, table.count, table.pieces, gradient_scale),
                *(workspace.data_ptr(), result.data_ptr(), stream),
            )
        on_host = result.cpu()
        first_not_finite = int(on_host.view(torch.int64)[1])
        return float(on_host[0]), None if first_not_finite < 0 else first_not_finite

    def update(self, tensors: Sequence[AdamwTensor], step: AdamwStep) -> None:
        if not tensors:
            return
        device = tensors[0].parameter.device
        table = _Table(tensor_words(tensors), [tensor.parameter.numel() for tensor in tensors], device)
        with self._streams.queue(device) as stream:
            self._library.qlk_cuda_adamw(
                *(table.tensors, table.first_piece, table.count, table.pieces),
                *(step.learning_rate, step.beta1, step.beta2, step.eps, step.gradient_scale),
                *(step.step, step.block_size, stream),
            )


class _Table:
    """The tensors of one call and the first piece of each, in the device's memory; sent without waiting for it."""

    def __init__(self, words: "array[int]", numels: Sequence[int], device: torch.device) -> None:
        structures = len(words)
        piece = 0
        for numel in numels:
            words.append(piece)
            piece += -(-numel // PIECE)
        words.append(piece)
        on_host = torch.frombuffer(words, dtype=torch.int64)
        if device.type == "cuda":
            self._memory = on_host.pin_memory().to(device, non_blocking=True)
        else:
            self._memory = on_host.clone()
        self.count, self.pieces = len(numels), piece
        self.tensors = self._memory.data_ptr()
        self.first_piece = self._memory[structures:].data_ptr()
