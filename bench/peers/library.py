"""The library as Python's peers call it: through ctypes, on the memory of PyTorch's tensors."""
import ctypes
import os

import torch


class Tensor(ctypes.Structure):
    _fields_ = [("block", ctypes.c_void_p), ("data", ctypes.c_void_p), ("dtype", ctypes.c_int32),
                ("device", ctypes.c_int32), ("ndim", ctypes.c_int32), ("reserved", ctypes.c_int32),
                ("shape", ctypes.c_int64 * 8), ("stride", ctypes.c_int64 * 8)]


POINTER = ctypes.POINTER(Tensor)


class Attention(ctypes.Structure):
    _fields_ = ([(name, POINTER) for name in ("q", "k", "v", "bias", "sinks", "alibi")]
                + [("mask", ctypes.c_void_p), ("window_left", ctypes.c_int64), ("window_right", ctypes.c_int64),
                   ("scale", ctypes.c_double), ("softcap", ctypes.c_double), ("dropout", ctypes.c_double),
                   ("seed", ctypes.c_uint64)]
                + [(name, ctypes.c_int32) for name in ("causal", "has_scale", "backend", "deterministic")]
                + [(name, POINTER) for name in ("out", "lse", "weights", "dead", "dout", "dlse", "dq", "dk", "dv",
                                                "dbias", "dsinks", "dalibi")]
                + [("used", ctypes.c_int32), ("kernel", ctypes.c_char * 36)])


library = ctypes.CDLL(os.environ.get("SAFEATTN_LIB", os.path.join(os.path.dirname(os.path.abspath(__file__)),
                                                                  "../../lua/safeattn/core.so")))
library.sa_last_error.restype = ctypes.c_char_p
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3, torch.bool: 4, torch.int32: 5}


def view(t):
    """A descriptor that borrows the memory of a PyTorch tensor on the CPU."""
    result = Tensor(data=t.data_ptr(), dtype=DTYPES[t.dtype], ndim=t.dim())
    for d in range(t.dim()):
        result.shape[d], result.stride[d] = t.shape[d], t.stride(d)
    return result


def check(status):
    if status:
        raise RuntimeError(library.sa_last_error().decode())


class Mask:
    def __init__(self, make, *arguments):
        self.handle = ctypes.c_void_p()
        check(getattr(library, make)(ctypes.byref(self.handle), *arguments))

    def both(self, other):
        return Mask("sa_mask_and", self.handle, other.handle)


class Call:
    """One attention, prepared: forward() and backward() write to the same memory every time. On a device that is not
    the CPU they write to copies, which fetch() brings back."""

    def __init__(self, q, k, v, dout, causal, mask, device=0):
        self.kept, self.device, self.copies = [q, k, v, dout, mask], device, []
        shape = (*q.shape[:3], v.shape[3])
        self.out = torch.empty(shape, dtype=q.dtype)
        self.lse = torch.empty(shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
        self.dq, self.dk, self.dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        self.attention = Attention()
        library.sa_attention_init(ctypes.byref(self.attention))
        self.attention.causal = 1 if causal else 0
        if mask is not None:
            self.attention.mask = mask.handle
        for name, t in (("q", q), ("k", k), ("v", v), ("out", self.out), ("lse", self.lse)):
            self.set(name, t)
        for name, t in (("dout", dout), ("dq", self.dq), ("dk", self.dk), ("dv", self.dv)):
            if t is not None:
                self.set(name, t)
        self.pointer = ctypes.byref(self.attention)

    def set(self, name, t):
        descriptor = view(t)
        if self.device:
            host, descriptor = descriptor, Tensor()
            check(library.sa_tensor_new(ctypes.byref(descriptor), host.dtype, self.device, host.ndim, host.shape))
            check(library.sa_copy(ctypes.byref(descriptor), ctypes.byref(host)))
            self.copies.append((host, descriptor))
        self.kept.append(descriptor)
        setattr(self.attention, name, ctypes.pointer(descriptor))

    def forward(self):
        check(library.sa_forward(self.pointer))

    def backward(self):
        check(library.sa_backward(self.pointer))

    def fetch(self):
        """Brings back what a device has, and lets go of its memory."""
        for host, copy in self.copies:
            check(library.sa_copy(ctypes.byref(host), ctypes.byref(copy)))
            library.sa_tensor_release(ctypes.byref(copy))
        self.copies = []
