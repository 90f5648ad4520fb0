"""Exchanging features between ranks, with gradients that are those of one process on the whole batch."""

import torch
import torch.distributed as dist


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


class _Gather(torch.autograd.Function):
    """All-gather along dimension 0; the backward pass sums the ranks' gradients of this rank's rows.

    Each rank computes the loss of the whole batch, so the sum holds every gradient world-size times, which the mean
    that DDP and DeepSpeed take over ranks divides away: exactly the gradient of one process (open_clip#616).
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        ctx.rows = x.shape[0]
        return all_gather(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def all_gather(x: torch.Tensor) -> torch.Tensor:
    """Rows of all ranks in rank order, (B, ...) -> (W * B, ...), without gradients; every rank gives as many rows."""
    if world_size() == 1:
        return x
    x = x.detach().contiguous()
    # Bytes for booleans: gloo and NCCL have no reduction-free type for them in common.
    wire = x.to(torch.uint8) if x.dtype == torch.bool else x
    out = wire.new_empty((world_size() * wire.shape[0], *wire.shape[1:]))
    # torch 2.14 renames it and warns at the old name.
    getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(out, wire)
    return out.to(x.dtype)


def all_gather_with_grad(x: torch.Tensor) -> torch.Tensor:
    """As `all_gather`, with gradients; see `_Gather`."""
    return x if world_size() == 1 else _Gather.apply(x)


def all_reduce_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x
