"""Finds on a CPU where a step would make the host wait for a GPU.

What is on "the device" is followed: weights, whatever is copied or made there, and whatever is computed from that. A
wait is what needs a value of it on the host (`item`, `tolist`, a shape that depends on values), and a copy to it that
is not from pinned memory (`torch.tensor(..., device=...)`).
"""

import traceback
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2"}
READERS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu}
FACTORIES = {torch.tensor, torch.as_tensor}
STAND_INS = ("waits_on_cpu.py", "megatron_on_cpu.py")


class Waits:
    """The places that wait, and how often: `found["path:function"]`. Paths are those of this repository, or start with
    the package's name."""

    def __init__(self, on_device: Iterable[torch.Tensor]) -> None:
        self.found: Counter[str] = Counter()
        self._storages: dict[int, StorageWeakRef] = {}
        self._modes = (_Calls(self), _Operations(self))
        for tensor in on_device:
            self.put(tensor)

    def put(self, *values) -> None:
        """These tensors are on the device."""
        for tensor in tensors_in(values):
            reference = StorageWeakRef(tensor.untyped_storage())
            self._storages[reference.cdata] = reference  # as long as it is held, no other storage has its number

    def has(self, *values) -> bool:
        """Whether one of them is on the device."""
        return any(tensor.untyped_storage()._cdata in self._storages for tensor in tensors_in(values))

    def note(self, what: str) -> None:
        self.found[f"{caller()} {what}"] += 1

    def __enter__(self) -> "Waits":
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


class _Calls(TorchFunctionMode):
    """What Python asks of torch, devices by name."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in READERS and self.waits.has(args[0]):
            self.waits.note(func.__name__)
        to_device = func is torch.Tensor.cuda or any(map(names_device, (*args, *kwargs.values())))
        result = func(*args, **kwargs)
        if func in FACTORIES and kwargs.get("device") is not None:
            self.waits.note(func.__name__)
            to_device = True
        if not to_device or not isinstance(result, torch.Tensor):
            return result
        if args and result is args[0] and not self.waits.has(result):
            result = result.clone()  # what stays on the host is another tensor
        self.waits.put(result)
        return result


class _Operations(TorchDispatchMode):
    """What torch computes, also in backward passes."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if self.waits.has(args, kwargs):
            if func._schema.name in READS or selects_by_mask(func, args):
                self.waits.note(func._schema.name.removeprefix("aten::"))
            self.waits.put(result)
        return result


def tensors_in(values) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def names_device(value) -> bool:
    return isinstance(value, (str, torch.device)) and str(value).startswith("cuda")


def selects_by_mask(func, args) -> bool:
    """Indexing by truth values, and repeating without a given size: the result's size depends on values."""
    if func._schema.name == "aten::index":
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    return func._schema.name == "aten::repeat_interleave" and len(args) < 2


def caller() -> str:
    """The innermost function that is neither torch's nor a stand-in's."""
    for frame in reversed(traceback.extract_stack()):
        if "/torch/" not in frame.filename and Path(frame.filename).name not in STAND_INS:
            return f"{shorten(frame.filename)}:{frame.name}"
    return "?"


def shorten(filename: str) -> str:
    _, found, rest = filename.rpartition("/site-packages/")
    return rest if found else str(Path(filename).relative_to(ROOT)) if filename.startswith(f"{ROOT}/") else filename
