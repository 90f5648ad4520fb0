"""Exchange of features between ranks, with the same gradients as one process on the whole batch."""

import torch
import torch.distributed as dist


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


class _Gather(torch.autograd.Function):
    """All-gather along dimension 0. The backward pass sums, over ranks, the gradients of this rank's rows.

    Each rank computes the loss of the whole batch, so the sum is world-size times the gradient. DDP and DeepSpeed
    average over ranks, which cancels this factor. The result is exactly the gradient of one process (open_clip#616).
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
    """Gathers the rows of all ranks in rank order, (B, ...) -> (W * B, ...), without gradients.

    Every rank must pass the same number of rows.
    """
    if world_size() == 1:
        return x
    x = x.detach().contiguous()
    # Booleans are sent as bytes: gloo and NCCL have no common boolean type.
    wire = x.to(torch.uint8) if x.dtype == torch.bool else x
    out = wire.new_empty((world_size() * wire.shape[0], *wire.shape[1:]))
    # torch 2.14 renames this function and warns about the old name.
    getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(out, wire)
    return out.to(x.dtype)


def all_gather_with_grad(x: torch.Tensor) -> torch.Tensor:
    """Like `all_gather`, with gradients; see `_Gather`."""
    return x if world_size() == 1 else _Gather.apply(x)


def all_reduce_sum(x: torch.Tensor) -> torch.Tensor:
    """Sums over ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x
