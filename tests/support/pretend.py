"""A second device inside of the processor, as strict as a GPU about what may meet what.

    with pretended() as device:
        walk(Walk(changes, place=Place(device)), ...)

PyTorch keeps a place for a device that somebody else makes. Here its tensors are wrappers around tensors of the processor, so that every number is the same to the bit, and a test can
hold a run on the device against one on the processor. What a GPU refuses is refused:

- an operation on tensors of both, except for numbers (0-dimensional tensors of the processor), copies, and positions that index into a tensor of the device;
- a tensor of the device as a NumPy array;
- random numbers made on it by the processor's generator.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretended"
INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default}
COPIES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}
_registered = False


class Wrapped(Tensor):
    """A tensor of the device; `inner` holds its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        made: Wrapped = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=torch.device(NAME, 0), requires_grad=False,
        )  # fmt: skip
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError(f"a tensor of {self.device} is no NumPy array: copy it to the processor first")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{NAME}({self.inner!r})"


class _Everywhere(TorchDispatchMode):
    """Sees operations that no tensor of the device takes part in: those that make one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _FromData(TorchFunctionMode):
    """`torch.tensor` fills a tensor below what the other mode sees."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        asked = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and asked is not None and torch.device(asked).type == NAME:
            return func(*args, **kwargs | {"device": "cpu"}).to(asked)
        return func(*args, **kwargs)


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    ours = any(isinstance(x, Wrapped) for x in tensors)
    if ours:
        _refuse_mixture(func, args, tensors)
    asked = kwargs.get("device")
    here = ours if asked is None else asked.type == NAME
    if asked is not None:
        if here and kwargs.get("generator") is not None:
            raise RuntimeError(f"{func}: a generator of the processor makes no numbers on {asked}")
        kwargs = kwargs | {"device": torch.device("cpu")}
    if func is torch.ops.aten.copy_.default:
        here = isinstance(args[0], Wrapped)
    plain_args, plain_kwargs = tree_map(_inner, (args, kwargs))
    out = func(*plain_args, **plain_kwargs)
    if here:
        out = tree_map(lambda x: Wrapped(x) if isinstance(x, Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if ours else out


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, Wrapped) else x


def _refuse_mixture(func: Any, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    if func in COPIES or (func in INDEXING and isinstance(args[0], Wrapped)):
        return
    strange = [x for x in tensors if not isinstance(x, Wrapped) and x.dim() > 0]
    numbers_first = isinstance(args[0], Tensor) and not isinstance(args[0], Wrapped) and str(func).split(".")[1].endswith("_")
    if strange or numbers_first:
        shapes = [(x.device.type, tuple(x.shape)) for x in tensors]
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, found {shapes}")


@contextmanager
def pretended() -> Iterator[torch.device]:
    """The device, for as long as it lasts."""
    global _registered
    if not _registered:
        _setup_privateuseone_for_python_backend(NAME)  # type: ignore[no-untyped-call]
        _registered = True
    with _FromData(), _Everywhere():
        yield torch.device(NAME, 0)
