"""What a step costs at least: its kernels, arithmetic and memory traffic, and their time on a GPU."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

LAUNCH = 2.5e-6  # seconds from one kernel of a CUDA graph to the next
BY_INDEX = {"index", "index_select", "gather"}  # they read of their source only what they give


class Counter(TorchDispatchMode):
    """Inside, `kernels` gets (arithmetic in FLOP, bytes read and written) of each operator that computes.

    Views and allocations compute nothing. The arithmetic is that of matrix products and convolutions alone.
    An operator on a list of tensors, as optimisers have them, counts as one kernel.
    """

    def __init__(self):
        super().__init__()
        self.kernels = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        results = operator(*args, **kwargs)
        read, written = tensors_in((args, kwargs)), tensors_in(results)
        changes = operator._schema.is_mutable
        memory = {tensor.untyped_storage()._cdata for tensor in read}
        is_view = not changes and any(tensor.untyped_storage()._cdata in memory for tensor in written)
        name = operator._schema.name.removeprefix("aten::")
        if is_view or "empty" in name or not (read or written):
            return results
        if changes:  # some return nothing
            written = tensors_in(
                [
                    value
                    for argument, value in zip(operator._schema.arguments, args, strict=False)
                    if argument.alias_info is not None and argument.alias_info.is_write
                ]
            )
        flops = 0
        if operator._overloadpacket in flop_registry:
            flops = flop_registry[operator._overloadpacket](*args, **kwargs, out_val=results)
        moved = 2 * total(written) if name in BY_INDEX else total(read) + total(written)
        self.kernels.append((flops, moved))
        return results


def tensors_in(values):
    """All tensors in lists, tuples and dictionaries, each once."""
    return list({id(leaf): leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)}.values())


def total(tensors):
    """Their bytes in memory: one that is only expanded has fewer than elements."""
    return sum(min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in tensors)


def counted(step):
    """[(FLOP, bytes)] of the kernels of one call."""
    with Counter() as counter:
        step()
    return counter.kernels


def seconds(kernels, flops_per_second, bytes_per_second):
    """No kernel takes less than its launch, its arithmetic or its memory traffic does."""
    return sum(max(LAUNCH, flops / flops_per_second, size / bytes_per_second) for flops, size in kernels)
