"""The fused kernels' errors over those of PyTorch's math path, on the same inputs: one table, for the CPU or a GPU

    make && python3 bench/peers/errors.py [--device=cuda] [--only=REGEX] [--seeds=3]

Needs PyTorch 2.6 or newer and NumPy. Both are compared with the definition: in f64, for inputs of f64 in long doubles.
Each cell is two ratios, of the largest error and of the norm of all errors, summed over seeds: at most 1 says that ours
are no larger. Half types stand against the math path as it comes, which computes in f32 and rounds at the end, and
against the one that computes in the dtype (allow_fp16_bf16_reduction_math_sdp). PyTorch gives no LSE: it is what its
logsumexp makes of scores in the dtype that ours has. On a GPU, SAFEATTN_CUDA_KERNELS=portable leaves out Hopper's
kernels; PyTorch runs on it where it can, and on the CPU otherwise. --only: the cases whose name the expression finds.
Random masks show half of the keys. The last lines name what is above 1.
"""
import ctypes
import math
import os
import re
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

try:
    import numpy as np
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
except ImportError as missing:
    sys.exit(f"errors: {missing}; PyTorch 2.6 or newer and NumPy are needed")

from library import Call, Mask, view

DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}
NAMES = ("out", "lse", "dq", "dk", "dv")
ROWS = 2048  # of all heads together
pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))


def option(name, default):
    return next((word[len(name) + 3:] for word in sys.argv if word.startswith(f"--{name}=")), default)


def product(a, b):
    """a b of long doubles, row by row of blocks that threads share; NumPy sums fastest along rows of b's transpose."""
    b = np.swapaxes(np.ascontiguousarray(np.swapaxes(b, -1, -2)), -1, -2)
    parts = [(head, rows) for head in range(len(a)) for rows in np.array_split(np.arange(a.shape[1]), 8)]
    done = pool.map(lambda part: a[part[0], part[1]] @ b[part[0]], parts)
    return np.concatenate(list(done)).reshape(*a.shape[:2], b.shape[2])


def visible(kind, length):
    """Which keys a query sees, [N, N], or None for all."""
    if kind == "dense":
        return None
    if kind == "causal":
        return torch.ones(length, length, dtype=torch.bool).tril()
    return (torch.rand(length, length) < 0.5).logical_or(torch.eye(length, dtype=torch.bool))


def definition(q, k, v, dout, seen):
    """Out, LSE and gradients of heads [H, N, E] in the wider type: tensors of f64, or arrays of long doubles."""
    wide = isinstance(q, np.ndarray)
    multiply = product if wide else torch.matmul
    exp = np.exp if wide else torch.exp
    log = np.log if wide else torch.log
    turn = (lambda x: np.swapaxes(x, -1, -2)) if wide else (lambda x: x.mT)
    scale = 1 / (np.sqrt(np.longdouble(q.shape[-1])) if wide else math.sqrt(q.shape[-1]))
    scores = multiply(q, turn(k)) * scale
    if seen is not None:
        scores = np.where(seen, scores, -np.inf) if wide else scores.masked_fill(~seen.to(q.device), -math.inf)
    top = scores.max(-1, keepdims=True) if wide else scores.amax(-1, keepdim=True)
    lse = top + log(exp(scores - top).sum(-1)[..., None])
    weights = exp(scores - lse)
    out = multiply(weights, v)
    dscores = weights * (multiply(dout, turn(v)) - (dout * out).sum(-1)[..., None])
    return {"out": out, "lse": lse[..., 0], "dq": multiply(dscores, k) * scale, "dk": multiply(turn(dscores), q) * scale,
            "dv": multiply(turn(weights), dout)}


def ours(tensors, kind, seen, device):
    """What the library makes of tensors [1, H, N, E] of the CPU, and the kernel's name."""
    mask = Mask("sa_mask_dense", ctypes.byref(view(seen))) if kind == "random" else None
    call = Call(*tensors, kind == "causal", mask, device)
    call.forward()
    forward = call.attention.kernel.decode()
    call.backward()
    call.fetch()
    return {"out": call.out, "lse": call.lse, "dq": call.dq, "dk": call.dk, "dv": call.dv}, forward


def math_path(tensors, kind, seen, reduced):
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(reduced)
    q, k, v = (t.detach().requires_grad_() for t in tensors[:3])
    seen = None if seen is None else seen.to(q.device)
    with sdpa_kernel(SDPBackend.MATH):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen if kind == "random" else None,
                                                               is_causal=kind == "causal")
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), tensors[3])
    with torch.no_grad():
        wide = q.dtype if q.dtype == torch.float64 else torch.float32
        scores = q.to(wide) @ k.to(wide).mT / math.sqrt(q.shape[-1])
        if seen is not None:
            scores = scores.masked_fill(~seen, -math.inf)
    return {"out": out.detach(), "lse": torch.logsumexp(scores, -1), "dq": dq, "dk": dk, "dv": dv}


def errors(results, truth):
    """The largest error and the errors' norm, over the largest value and the values' norm, of all results."""
    found = {}
    for name in NAMES:
        x = results[name][0]
        if isinstance(truth[name], np.ndarray):
            exact = truth[name].ravel()
            error = x.cpu().numpy().ravel() - exact
            found[name] = np.array([np.abs(error).max() / np.abs(exact).max(),
                                    np.sqrt((error * error).sum() / (exact * exact).sum())], float)
        else:
            error = x.to(truth[name]) - truth[name]
            found[name] = np.array([(error.abs().max() / truth[name].abs().max()).item(),
                                    (error.norm() / truth[name].norm()).item()])
    return found


def compare(dtype, width, length, kind, seeds, device):
    """Errors of ours and of PyTorch's math path by its kind, summed over seeds, and the kernel."""
    sums, peers = {}, {"math": False}
    if dtype in ("bf16", "f16"):
        peers[f"math in {dtype}"] = True
    where = "cuda" if device and torch.cuda.is_available() else "cpu"
    for seed in range(1 if dtype == "f64" and length > 512 else seeds):
        torch.manual_seed(seed)
        tensors = [torch.randn(1, max(1, ROWS // length), length, width, dtype=torch.float64).to(DTYPES[dtype])
                   for _ in range(4)]
        seen = visible(kind, length)
        if dtype == "f64":
            truth = definition(*(t[0].numpy().astype(np.longdouble) for t in tensors),
                               None if seen is None else seen.numpy())
        else:
            truth = definition(*(t[0].to(where).double() for t in tensors), seen)
        results, kernel = ours(tensors, kind, seen, device)
        runs = {"ours": results}
        for name, reduced in peers.items():
            runs[name] = math_path([t.to(where) for t in tensors], kind, seen, reduced)
        for name, run in runs.items():
            for what, error in errors(run, truth).items():
                sums[name, what] = sums.get((name, what), 0) + error
    return sums, list(peers), kernel


def main():
    device = 1 if option("device", "cpu") == "cuda" else 0
    torch.backends.cuda.matmul.allow_tf32 = False
    warnings.simplefilter("ignore")  # the first gradient on a GPU says that its thread had no context yet
    only, seeds = re.compile(option("only", "")), int(option("seeds", "3"))
    above = []
    print(f"PyTorch {torch.__version__}; error over the math path's: largest, norm ({seeds} seeds)")
    print(f"{'':48}" + "".join(f"{name:>13}" for name in NAMES))
    for dtype in DTYPES:
        for kind in ("dense", "causal", "random"):
            for length in (128, 512, 2048):
                for width in (64, 128):
                    name = f"{dtype} {kind} N{length} D{width}"
                    if not only.search(name):
                        continue
                    sums, peers, kernel = compare(dtype, width, length, kind, seeds, device)
                    for peer in peers:
                        ratios = [sums["ours", what] / sums[peer, what] for what in NAMES]
                        above += [f"{name} {what} {norm:4.2f} of {peer}'s norm" for what, (_, norm) in
                                  zip(NAMES, ratios) if norm > 1]
                        cells = "".join(f"   {largest:4.2f}  {norm:4.2f}" for largest, norm in ratios)
                        print(f"{name:23} {kernel.replace('fused-', ''):13} {peer:10} {cells}", flush=True)
    print("\n".join(above))


main()
