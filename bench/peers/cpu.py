"""The fused CPU kernels beside PyTorch's SDPA and ONNX Runtime's MultiHeadAttention: one run, the same cores

    make && python3 bench/peers/cpu.py [--quick] [--only=REGEX]

Needs PyTorch 2.6 or newer; ONNX Runtime is left out where it is missing. --only: the cases whose name the expression
finds. The library is called through ctypes on the very memory of PyTorch's tensors. Results are compared before
anything is timed. Contestants take turns of some 20 ms of wall time; a ratio is that of a peer's turn to the mean of
ours before and after it, and what is shown of times and ratios is their median. Before each turn everybody's threads
have gone to sleep: those of OpenMP and of ONNX Runtime go on spinning after a call for longer than many a call takes,
on the cores that the next one's threads want. Prints a table and writes build/bench-peers.json.
"""
import ctypes
import json
import os
import re
import statistics
import sys
import time

try:
    import torch
except ImportError:
    sys.exit("peers: skipped, Python has no PyTorch here (2.6 or newer is needed)")
if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 6):
    sys.exit(f"peers: skipped, PyTorch {torch.__version__} is older than 2.6")
try:
    import onnxruntime
except ImportError:
    onnxruntime = None
    print("peers: without ONNX Runtime, which Python does not have here")

from library import Call, Mask, library, view

QUICK = "--quick" in sys.argv
TURN, ROUNDS, SECONDS, LIMIT = (5e-3, 3, 0.1, 1) if QUICK else (20e-3, 9, 1, 20)
ONLY = re.compile(next((word[7:] for word in sys.argv if word.startswith("--only=")), ""))
sdpa = torch.nn.functional.scaled_dot_product_attention


# ONNX Runtime ---------------------------------------------------------------------------------------------------------

def field(number, value):
    """One field of a protocol buffer: a number, or bytes."""
    def variable(n):
        out = bytearray()
        while n > 127:
            out.append(n & 127 | 128)
            n >>= 7
        return bytes(out + bytes([n]))
    if isinstance(value, int):
        return variable(number << 3) + variable(value)
    data = value.encode() if isinstance(value, str) else value
    return variable(number << 3 | 2) + variable(len(data)) + data


def onnx_model(batch, length, heads, width, causal):
    def value(name):
        dims = b"".join(field(1, field(1, n)) for n in (batch, length, heads * width))
        return field(1, name) + field(2, field(1, field(1, 1) + field(2, dims)))

    def attribute(name, number):
        return field(5, field(1, name) + field(3, number) + field(20, 2))

    node = b"".join(field(1, name) for name in ("q", "k", "v")) + field(2, "out") + field(4, "MultiHeadAttention")
    node += attribute("num_heads", heads) + attribute("unidirectional", int(causal)) + field(7, "com.microsoft")
    graph = field(1, node) + field(2, "attention") + b"".join(field(11, value(name)) for name in ("q", "k", "v"))
    graph += field(12, value("out"))
    return field(1, 8) + field(7, graph) + field(8, field(1, "") + field(2, 17)) + field(
        8, field(1, "com.microsoft") + field(2, 1))


def onnx_run(q, k, v, causal, threads):
    batch, heads, length, width = q.shape
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(onnx_model(batch, length, heads, width, causal), options,
                                           providers=["CPUExecutionProvider"])
    feed = {name: t.transpose(1, 2).reshape(batch, length, heads * width).contiguous().numpy()
            for name, t in (("q", q), ("k", k), ("v", v))}

    def run():
        return torch.from_numpy(session.run(None, feed)[0]).view(batch, length, heads, width).transpose(1, 2)
    return run


# Measuring ------------------------------------------------------------------------------------------------------------

def rest():
    """Returns when the process has hardly used a processor for 20 ms: its threads have stopped spinning."""
    for _ in range(50):
        before = time.process_time()
        time.sleep(20e-3)
        if time.process_time() - before < 2e-3:
            return


def turn(fn):
    """The median of the seconds that calls take, of which the first wakes the threads and counts only if it is long."""
    times, total = [], 0.0
    rest()
    while total < TURN:
        start = time.perf_counter()
        fn()
        times.append(time.perf_counter() - start)
        total += times[-1]
    return statistics.median(times[1:] or times)


def in_turn(functions):
    """Milliseconds of functions that take turns, how many times as long as the first the others take, and the rounds."""
    first, *others = functions
    times = {name: [] for name in functions}
    start, elapsed = time.perf_counter(), 0.0
    while len(times[first]) < 3 or elapsed < SECONDS or len(times[first]) < ROUNDS and elapsed < LIMIT:
        for name, fn in functions.items():
            times[name].append(turn(fn))
        elapsed = time.perf_counter() - start
    times[first].append(turn(functions[first]))
    ratios = {}
    for name in others:
        ratio = [2 * theirs / (before + after)
                 for theirs, before, after in zip(times[name], times[first], times[first][1:])]
        low, median, high = statistics.quantiles(ratio, n=4, method="inclusive")
        ratios[name] = {"low": low, "median": median, "high": high}
    return {"ms": {name: statistics.median(list_) * 1e3 for name, list_ in times.items()}, "slower": ratios,
            "rounds": len(times[first]) - 1}


def same(ours, theirs, alive, what):
    """Both agree on the rows that see a key; what PyTorch gives for the others is its own affair."""
    zero = torch.zeros((), dtype=torch.double)
    difference = torch.where(alive, ours.double() - theirs.double(), zero).abs().max().item()
    size = torch.where(alive, theirs.double(), zero).abs().max().item()
    room = 2e-2 if ours.dtype in (torch.float16, torch.bfloat16) else 1e-4
    if not difference <= room * max(size, 1e-3):
        raise RuntimeError(f"{what}: differs by {difference:g} where values reach {size:g}")


def results_of(case, threads):
    name, shape, dtype = case["name"], case["shape"], case.get("dtype", torch.float32)
    batch, heads, queries, width = shape
    keys, key_heads = case.get("keys", queries), case.get("key_heads", heads)
    torch.manual_seed(1)
    q = torch.randn(shape, dtype=dtype)
    k, v = (torch.randn(batch, key_heads, keys, width, dtype=dtype) for _ in range(2))
    dout = torch.randn(shape, dtype=dtype)
    causal, dense = case.get("causal", False), case.get("dense")
    alive = torch.ones(1, 1, queries, 1, dtype=torch.bool)
    if dense is not None:
        alive = dense.any(-1, keepdim=True).view(-1, 1, queries, 1)
    forward_only = case.get("forward_only", False)
    gqa = {"enable_gqa": True} if heads != key_heads else {}

    torch.set_num_threads(threads)
    library.sa_threads(threads)
    ours = Call(q, k, v, None if forward_only else dout, causal, case.get("mask"))
    ours.forward()
    leaves = [t.detach().requires_grad_(not forward_only) for t in (q, k, v)]

    def torch_forward():
        with torch.no_grad():
            return sdpa(q, k, v, attn_mask=dense, is_causal=causal, **gqa)
    same(ours.out, torch_forward(), alive, name)
    contestants = {"safeattn": ours.forward, "torch": torch_forward}
    if onnxruntime and dtype == torch.float32 and dense is None and heads == key_heads and queries == keys:
        run = onnx_run(q, k, v, causal, threads)
        same(ours.out, run(), alive, name + ", ONNX Runtime")
        contestants["onnxruntime"] = run
    rows = [{"case": name, "way": "forward", "threads": threads, **in_turn(contestants)}]
    if not forward_only:
        out = sdpa(*leaves, attn_mask=dense, is_causal=causal)
        def torch_backward():
            return torch.autograd.grad(out, leaves, dout * alive, retain_graph=True)
        # A dead row's dO meets o = 0 with us; PyTorch may differ there, so it gets 0 in both.
        dout.mul_(alive)
        ours.backward()
        for mine, theirs, what in zip((ours.dq, ours.dk, ours.dv), torch_backward(), ("dq", "dk", "dv")):
            same(mine, theirs, torch.ones(1, dtype=torch.bool), f"{name}, {what}")
        def torch_backward_alone():
            return torch.autograd.grad(out, leaves, dout, retain_graph=True)
        rows.append({"case": name, "way": "backward", "threads": threads,
                     **in_turn({"safeattn": ours.backward, "torch": torch_backward_alone})})
    return rows


def cases():
    n, heads = 512 if QUICK else 2048, 8
    i = torch.arange(n)
    below = i[:, None] >= i[None]
    causal = Mask("sa_mask_causal", 1)
    random = torch.rand(n, n, generator=torch.Generator().manual_seed(1)) < 0.5
    random[::10] = False
    ids = (i * 8 // n).to(torch.int32)
    documents = Mask("sa_mask_documents", None, ctypes.byref(view(ids)))
    long = 2 * n
    half = torch.arange(long).expand(long, long) < n
    real = [long // 8, long * 3 // 8, long * 5 // 8, long * 7 // 8]
    lengths = (ctypes.c_int64 * 4)(*real)
    ends = torch.tensor(real).view(4, 1, 1, 1) > torch.arange(long)
    padding = (ends & ends.transpose(2, 3)).contiguous()
    window = Mask("sa_mask_window", ctypes.c_int64(512), ctypes.c_int64(0), 0)
    for width in (64, 128):
        yield {"name": f"f32 D{width}", "shape": (1, heads, n, width), "threads": (1, 2)}
    for width in (64, 128):
        yield {"name": f"f32 D{width} causal", "shape": (1, heads, n, width), "causal": True, "threads": (1, 2)}
    masks = {"random 50 %, a tenth of the rows dead": (Mask("sa_mask_dense", ctypes.byref(view(random))), random, n),
             "window 512": (window, below & (i[:, None] - i[None] <= 512), n),
             "8 documents, causal": (documents.both(causal), below & (ids[:, None] == ids[None]), n),
             f"keys of {long} padded to half": (Mask("sa_mask_padding", (ctypes.c_int64 * 1)(n), None, ctypes.c_int64(1)),
                                             half.contiguous(), long),
             "padding of a batch, keys and queries": (Mask("sa_mask_padding", lengths, lengths, ctypes.c_int64(4)),
                                                      padding, long)}
    for name, (mask, dense, length) in masks.items():
        batch = dense.shape[0] if dense.dim() == 4 else 1
        yield {"name": "f32 D64 " + name, "shape": (batch, heads // batch, length, 64), "mask": mask, "dense": dense}
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "f16")):
        yield {"name": f"{name} D128", "shape": (1, heads, n, 128), "dtype": dtype}
    yield {"name": "f32 small [8,12,128,64]", "shape": (8, 12, 128, 64)}
    yield {"name": "f32 tiny [1,1,4,8]", "shape": (1, 1, 4, 8)}
    for dtype, name in ((torch.float32, "f32"), (torch.bfloat16, "bf16")):
        yield {"name": f"{name} decoding, 1 x {32 * n}, 32:8 heads, D128", "shape": (1, 32, 1, 128), "keys": 32 * n,
               "key_heads": 8, "dtype": dtype, "forward_only": True, "threads": (1, 2)}


def main():
    print(f"PyTorch {torch.__version__}, ONNX Runtime {onnxruntime.__version__ if onnxruntime else '-'}; ms, and how many "
          "times as long as safeattn, with quartiles")
    print(f"{'':66} {'safeattn':>9} {'torch':>9} {'ratio':>21} {'ort':>9} {'ratio':>21}")
    results = []
    for case in filter(lambda case: ONLY.search(case["name"]), cases()):
        for threads in case.get("threads", (1,)):
            try:
                rows = results_of(case, threads)
            except RuntimeError as error:
                print(f"{case['name']}: {error}")
                continue
            for row in rows:
                ms = row["ms"]
                line = f"{row['case'] + ', ' + row['way'] + ', ' + str(threads) + ' thr':66} {ms['safeattn']:9.3f}"
                for peer, ratio in row["slower"].items():
                    line += f" {ms[peer]:9.3f} {ratio['median']:5.2f} ({ratio['low']:5.2f} to {ratio['high']:5.2f})"
                print(line, flush=True)
            results += rows
    os.makedirs("build", exist_ok=True)
    with open("build/bench-peers.json", "w") as file:
        json.dump({"torch": torch.__version__, "onnxruntime": onnxruntime.__version__ if onnxruntime else None,
                   "results": results}, file, indent=1)


main()
